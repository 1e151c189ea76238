package station

// A Code names what is wrong, for a technician: one sentence and one next action in the catalogue (pkg/station/texts), in each
// language. Codes never change their meaning. Fields in braces are what the sentence may show.
type Code string

// The codes. Group 1 is about the unit that was scanned, 2 about the order, 3 about the station, 4 about the fixture, 5 about the
// label, 6 about the identity, 8 are lamps, 9 is the program's own fault.
const (
	CodeNotSerial   Code = "E-101" // what was scanned is no serial: {scan}
	CodeMade        Code = "E-102" // the unit is made already: {serial} {when} {operator} {station}
	CodeInWork      Code = "E-103" // the serial is on a head now: {serial} {head}
	CodeTries       Code = "E-104" // tried too often: {serial} {tries}
	CodeNotInOrder  Code = "E-105" // the order does not have the serial: {serial} {order}
	CodeProduct     Code = "E-106" // the board is another product: {want} {found}
	CodeScrapped    Code = "E-107" // the unit was scrapped: {serial} {when} {operator}
	CodeNotMade     Code = "E-108" // rework, scrap, reprint: the unit is not there: {serial}
	CodeBusy        Code = "E-109" // no head is free
	CodeElsewhere   Code = "E-110" // begun with another profile or place: {serial} {when}
	CodeNotFinished Code = "E-111" // reprint: the unit has not passed: {serial}

	CodeOrderEarly   Code = "E-201" // the order is not valid yet: {order} {from}
	CodeOrderExpired Code = "E-202" // {order} {until}
	CodeOrderSpent   Code = "E-203" // {order} {quantity}
	CodeOrderClosed  Code = "E-204" // {order}
	CodeOrderStation Code = "E-205" // for other stations: {order}
	CodeNoOrder      Code = "E-206" // the line needs an order and has none
	CodeOrderProfile Code = "E-207" // for another product or profile: {order}
	CodeOrderForged  Code = "E-208" // not what its owner signed: {order}

	CodeClock     Code = "E-301" // the clock is wrong
	CodeDisk      Code = "E-302" // no room: {where}
	CodeToken     Code = "E-303" // the token is away
	CodeTokenPIN  Code = "E-304" // the token refuses the PIN
	CodePrinter   Code = "E-305" // the printer does not answer
	CodeAnchor    Code = "E-306" // the ledger is older than its counter: copied, or restored
	CodeLedger    Code = "E-307" // the ledger cannot be opened or is damaged
	CodeLocked    Code = "E-308" // another touchmark uses the ledger: {owner}
	CodeBadge     Code = "E-309" // the badge is not known
	CodePIN       Code = "E-310" // wrong PIN
	CodePINLocked Code = "E-311" // too many wrong PINs: wait
	CodeLead      Code = "E-312" // needs a lead's badge
	CodeGolden    Code = "E-313" // the golden sample came out differently

	CodeProbe          Code = "E-401" // the board does not answer
	CodeProbeTimeout   Code = "E-402"
	CodeFlash          Code = "E-411" // the flash command failed
	CodeFlashTimeout   Code = "E-412"
	CodeReadBack       Code = "E-421" // what was read back differs
	CodeReadBackFailed Code = "E-422" // nothing could be read back
	CodeChallenge      Code = "E-431" // the device signed wrongly
	CodeNoChallenge    Code = "E-432" // the device did not answer
	CodeRegister       Code = "E-441" // the test registration failed

	CodePrint      Code = "E-501" // the label did not print
	CodePaper      Code = "E-502" // out of paper, open, paused
	CodeOtherLabel Code = "E-503" // the label scanned is another unit's: {scan}
	CodeNoScan     Code = "E-504" // the label was not scanned in time

	CodeMint    Code = "E-601" // the identity could not be made
	CodeStamp   Code = "E-602" // the stamp could not be written
	CodeGenuine Code = "E-603" // the TPM's maker is not known, or it does not prove itself
	CodeTwice   Code = "E-604" // the key or TPM belongs to another unit: {serial}

	LampHooks  Code = "L-801" // the factory system does not take news: {depth}
	LampQuota  Code = "L-802" // the order is nearly spent: {left}
	LampExpiry Code = "L-803" // the order ends soon: {until}
	LampAnchor Code = "L-804" // nothing guards this ledger against being copied

	CodeInternal Code = "E-901"
)

// Codes lists every code, for catalogues to be complete.
func Codes() []Code {
	return []Code{
		CodeNotSerial, CodeMade, CodeInWork, CodeTries, CodeNotInOrder, CodeProduct, CodeScrapped, CodeNotMade, CodeBusy, CodeElsewhere, CodeNotFinished,
		CodeOrderEarly, CodeOrderExpired, CodeOrderSpent, CodeOrderClosed, CodeOrderStation, CodeNoOrder, CodeOrderProfile, CodeOrderForged,
		CodeClock, CodeDisk, CodeToken, CodeTokenPIN, CodePrinter, CodeAnchor, CodeLedger, CodeLocked, CodeBadge, CodePIN, CodePINLocked, CodeLead, CodeGolden,
		CodeProbe, CodeProbeTimeout, CodeFlash, CodeFlashTimeout, CodeReadBack, CodeReadBackFailed, CodeChallenge, CodeNoChallenge, CodeRegister,
		CodePrint, CodePaper, CodeOtherLabel, CodeNoScan,
		CodeMint, CodeStamp, CodeGenuine, CodeTwice,
		LampHooks, LampQuota, LampExpiry, LampAnchor,
		CodeInternal,
	}
}

// Reasons for rework and for scrapping, as the ledger keeps them; "reason.board" in the catalogue. Their order is that of the
// numbers on the screen.
var (
	ReworkReasons = []string{"board", "secure-element", "storage", "other"}
	ScrapReasons  = []string{"damaged", "test-failed", "burnt", "cosmetic", "other"}
)
