package station

import "time"

// A Phase is where a shift stands.
type Phase string

// The phases of a shift, in their order.
const (
	PhaseBadge  Phase = "badge"  // waiting for an operator
	PhaseChecks Phase = "checks" // the station looks at itself; failed checks are looked at again on demand
	PhaseWork   Phase = "work"   // units are made
	PhaseEnded  Phase = "ended"  // the shift is closed
)

// An Ask is what the station takes the next line of input for.
type Ask string

// What a station asks for. A scanner is a keyboard that ends with Enter, so each answer is one line.
const (
	AskBadge   Ask = "badge"
	AskPIN     Ask = "pin"     // shown as dots
	AskRetry   Ask = "retry"   // a check failed: Enter looks again
	AskSerial  Ask = "serial"  // of the next unit; of the unit that a function is for, while Function says which
	AskLabel   Ask = "label"   // the label of the unit on head AskHead is scanned back
	AskReason  Ask = "reason"  // a number out of Reasons
	AskConfirm Ask = "confirm" // Enter alone or Yes does it, a second function key leaves it
	AskClose   Ask = "close"   // the shift has ended: Enter leaves its counts
	AskNothing Ask = ""
)

// A Function is what a function key does. Each can be scanned as well, from a sheet with codes that hold "TM!" and its name.
type Function string

// The functions.
const (
	Rework  Function = "rework"  // F2: a board was replaced, the serial gets its next revision
	Scrap   Function = "scrap"   // F3: a unit is destroyed
	Reprint Function = "reprint" // F4: the label of a finished unit again
	Help    Function = "help"    // F1
	End     Function = "end"     // F10: end of shift
	Cancel  Function = "cancel"  // Esc: leaves a function; without one it gives up a unit that waits, after asking
	Yes     Function = "yes"     // what Enter alone says where the screen asks to confirm, for those who have a scanner only
)

// A CheckState is how a check at the start of a shift stands.
type CheckState string

// The states of a check.
const (
	CheckWaiting CheckState = "waiting"
	CheckRunning CheckState = "running"
	CheckOK      CheckState = "ok"
	CheckFailed  CheckState = "failed"
)

// A Check is one look at the station itself: "clock" is "check.clock" in the catalogue.
type Check struct {
	Name   string            `json:"name"`
	State  CheckState        `json:"state"`
	Code   Code              `json:"code,omitempty"`
	Fields map[string]string `json:"fields,omitempty"` // what the code's text has in braces
	Detail string            `json:"detail,omitempty"` // for whoever mends it, in English
}

// A HeadState is what a head is doing.
type HeadState string

// The states of a head.
const (
	HeadIdle    HeadState = "idle"
	HeadWorking HeadState = "working"
	HeadAsking  HeadState = "asking"  // its label is to be scanned back
	HeadWaiting HeadState = "waiting" // something that is not the unit's fault is away: token, printer; it goes on by itself
	HeadPassed  HeadState = "passed"  // until its next unit
	HeadFailed  HeadState = "failed"
)

// A Head is one fixture, as the screen shows it.
type Head struct {
	Number  int       `json:"head"` // from 1
	State   HeadState `json:"state"`
	Serial  string    `json:"serial,omitempty"`
	Step    Step      `json:"step,omitempty"`
	Index   int       `json:"index,omitempty"` // of the step, from 1
	Of      int       `json:"of,omitempty"`
	Started time.Time `json:"started,omitzero"` // the unit
	Stepped time.Time `json:"stepped,omitzero"` // the step
	// Waiting says what for, while State is waiting.
	Waiting Code     `json:"waiting,omitempty"`
	Verdict *Verdict `json:"verdict,omitempty"` // of its last unit, while passed or failed
}

// A Step is one step of a unit's way; "step.flash" in the catalogue.
type Step string

// The steps, in their order. A station leaves out what its configuration does not name.
const (
	StepProbe     Step = "probe"
	StepMint      Step = "mint"
	StepStamp     Step = "stamp"
	StepFlash     Step = "flash"
	StepReadBack  Step = "readback"
	StepChallenge Step = "challenge"
	StepRegister  Step = "register"
	StepLabel     Step = "label"
	StepScan      Step = "scan"
	StepSeal      Step = "seal"
)

// A Verdict is what became of a unit.
type Verdict struct {
	Pass           bool              `json:"pass"`
	Serial         string            `json:"serial"`
	RegistrationID string            `json:"registrationId,omitempty"`
	Revision       int               `json:"revision,omitempty"`
	Head           int               `json:"head,omitempty"`
	Code           Code              `json:"code,omitempty"` // why not
	Fields         map[string]string `json:"fields,omitempty"`
	Step           Step              `json:"step,omitempty"`   // that failed
	Detail         string            `json:"detail,omitempty"` // for whoever mends it, in English; redacted
	Attempt        int               `json:"attempt,omitempty"`
	DryRun         bool              `json:"dryRun,omitempty"`
	At             time.Time         `json:"at"`
	Seconds        float64           `json:"seconds"`
}

// Stopped reports whether the unit came to no verdict: the shift was stopped at once. It is taken up when it is scanned again.
func (v *Verdict) Stopped() bool { return !v.Pass && v.Code == "" }

// Counts are the numbers of a shift.
type Counts struct {
	Passed    int64 `json:"passed"`
	Failed    int64 `json:"failed"` // units, not tries, whose last verdict is FAIL
	Reworked  int64 `json:"reworked"`
	Scrapped  int64 `json:"scrapped"`
	Reprinted int64 `json:"reprinted"`
	// FirstPass is how many units passed at their first try, of FirstTried.
	FirstPass  int64 `json:"firstPass"`
	FirstTried int64 `json:"firstTried"`
	// PerHour is the rate over the last hour, or over the shift while that is shorter.
	PerHour float64 `json:"perHour"`
	// Left is how many units the order still allows; -1 where no order limits them.
	Left int64 `json:"left"`
}

// A View is everything that a screen shows, at one instant. It is the receiver's own.
type View struct {
	Now      time.Time         `json:"now"`
	Station  string            `json:"station"`
	Product  string            `json:"product,omitempty"`
	Order    string            `json:"order,omitempty"`
	Operator string            `json:"operator,omitempty"`
	DryRun   bool              `json:"dryRun,omitempty"`
	Phase    Phase             `json:"phase"`
	Ask      Ask               `json:"ask,omitempty"`
	AskHead  int               `json:"askHead,omitempty"`  // AskLabel: whose label
	Function Function          `json:"function,omitempty"` // being done: AskSerial, AskReason and AskConfirm belong to it; End alone waits for the heads
	Subject  string            `json:"subject,omitempty"`  // the serial that Function is for
	Reasons  []string          `json:"reasons,omitempty"`  // words of the catalogue ("reason.fell"); the answer is a number from 1
	Checks   []Check           `json:"checks,omitempty"`
	Heads    []Head            `json:"heads"`
	Last     []Verdict         `json:"last,omitempty"` // newest first, ten at most
	Counts   Counts            `json:"counts"`
	Notice   Code              `json:"notice,omitempty"` // about the last input, when it was not taken: "E-103"
	Fields   map[string]string `json:"fields,omitempty"` // of Notice
	Help     bool              `json:"help,omitempty"`   // the help page is open
	// Lamps are lasting troubles that do not stop the work: codes of group 8. LampFields are what their sentences show, by lamp.
	Lamps      []Code                     `json:"lamps,omitempty"`
	LampFields map[Code]map[string]string `json:"lampFields,omitempty"`
}
