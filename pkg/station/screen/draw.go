package screen

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"charm.land/lipgloss/v2"
	"github.com/charmbracelet/x/ansi"
	"golang.org/x/text/unicode/norm"

	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/texts"
)

// The least that everything fits into. Less still shows verdicts, codes and the input.
const minWidth, minHeight = 80, 24

// maxField is how many columns of a field a sentence shows: a scan may be as long as whoever printed it likes.
const maxField = 28

// maxShown is how many bytes of anything from outside are looked at: more than the widest terminal shows.
const maxShown = 1024

// Colours are the sixteen that every terminal has; each only underlines what characters say already.
var (
	styleBar    = lipgloss.NewStyle().Reverse(true)
	styleBold   = lipgloss.NewStyle().Bold(true)
	styleGood   = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Green)
	styleBad    = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Red)
	styleWait   = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Yellow)
	styleNotice = lipgloss.NewStyle().Bold(true).Reverse(true).Foreground(lipgloss.Red)
)

// A drawing is one view of a station on a terminal of w columns and h rows.
type drawing struct {
	station.View
	text  *texts.Text
	ascii bool
	w, h  int
	input string // the unfinished line
	dots  bool   // do not show it
}

// lines draws the whole terminal: h lines of w columns.
func (d *drawing) lines() []string {
	if d.w < minWidth || d.h < minHeight {
		return d.small()
	}
	messages := 3 + max(0, d.h-minHeight)/6
	if d.Help && d.Notice == "" {
		messages = 0
	}
	body := d.h - messages - 5
	lines := []string{d.header()}
	lines = append(lines, d.body(body)...)
	lines = append(lines, styleBar.Render(d.fit(" "+d.counts(d.w-2), d.w)))
	lines = append(lines, d.exactly(d.messages(messages), messages, d.w)...)
	return append(lines, d.prompt(), d.lamps(), d.keys())
}

// header is where one is: station, product, order, operator, clock.
func (d *drawing) header() string {
	clock := d.Now.Format("15:04:05")
	if d.w >= 100 {
		clock = d.Now.Format("2006-01-02 15:04:05")
	}
	named, plain := d.clean(d.Station), d.clean(d.Station)
	if d.DryRun {
		mark := "*** " + d.word("label.dryrun") + " *** "
		named, plain = mark+named, mark+plain
	}
	for _, f := range [][2]string{{"label.product", d.Product}, {"label.order", d.Order}, {"label.operator", d.Operator}} {
		if f[1] != "" {
			named += "   " + d.word(f[0]) + " " + d.clean(f[1])
			plain += "  " + d.clean(f[1])
		}
	}
	room := d.w - len(clock) - 4
	if ansi.StringWidth(named) > room {
		named = plain
	}
	return styleBar.Bold(true).Render(" " + d.fit(named, room) + "  " + clock + " ")
}

// body is what the phase is about, and the last units beside it.
func (d *drawing) body(h int) []string {
	if d.Help {
		return d.exactly(d.help(), h, d.w)
	}
	right := min(max(d.w*28/100, 28), 40)
	left := d.w - right - 3
	var lines []string
	switch d.Phase {
	case station.PhaseChecks:
		lines = d.checks(left, h)
	case station.PhaseWork:
		lines = d.heads(left, h)
	case station.PhaseEnded:
		lines = d.ended(left, h)
	default:
		lines = d.stack(h, left, []string{d.middle(styleBold, d.word("phase."+string(d.Phase)), left)})
	}
	lines = d.exactly(lines, h, left)
	last := d.exactly(d.last(right, h), h, right)
	for i := range lines {
		lines[i] += " " + d.bar() + " " + last[i]
	}
	return lines
}

func (d *drawing) bar() string {
	if d.ascii {
		return "|"
	}
	return "│"
}

func (d *drawing) rule(n int) string {
	if d.ascii {
		return strings.Repeat("-", max(n, 0))
	}
	return strings.Repeat("─", max(n, 0))
}

// last are the newest verdicts, and the counts that have no room below.
func (d *drawing) last(w, h int) []string {
	lines := []string{styleBold.Render(d.fit(d.word("label.last"), w))}
	for _, v := range d.Last[:min(len(d.Last), 10, h-1)] {
		style, result := styleGood, "PASS"
		if !v.Pass {
			style, result = styleBad, d.code(v.Code)
		}
		serial := w - 5 - 5 - 4 - 3
		lines = append(lines, v.At.In(d.Now.Location()).Format("15:04")+" "+d.fit(d.cut(d.clean(v.Serial), serial), serial)+" "+
			style.Render(d.fit(result, 5))+" "+fmt.Sprintf("%4s", seconds(v.Seconds)))
	}
	if c := d.Counts; h >= 16 {
		for len(lines) < h-4 {
			lines = append(lines, "")
		}
		for _, n := range []struct {
			word string
			n    int64
		}{{"count.reworked", c.Reworked}, {"count.scrapped", c.Scrapped}, {"count.reprinted", c.Reprinted}} {
			lines = append(lines, d.fit(d.word(n.word), w-6)+fmt.Sprintf("%6d", n.n))
		}
	}
	return lines
}

// counts are the numbers that are always there.
func (d *drawing) counts(w int) string {
	c, yield, left := d.Counts, "-", "-"
	if c.FirstTried > 0 {
		yield = fmt.Sprintf("%.1f%%", 100*float64(c.FirstPass)/float64(c.FirstTried))
	}
	if c.Left >= 0 {
		left = strconv.FormatInt(c.Left, 10)
	}
	fields := []string{"count.passed", strconv.FormatInt(c.Passed, 10), "count.failed", strconv.FormatInt(c.Failed, 10),
		"count.firstpass", yield, "count.perhour", fmt.Sprintf("%.0f", c.PerHour), "count.left", left}
	var parts []string
	total := 0
	for i := 0; i < len(fields); i += 2 {
		parts = append(parts, d.word(fields[i])+" "+fields[i+1])
		total += ansi.StringWidth(parts[i/2])
	}
	return strings.Join(parts, strings.Repeat(" ", min(max((w-total)/(len(parts)-1), 1), 8)))
}

// messages are about the last input, then what is to choose from, then what is wrong on the heads whose tiles have no room for it.
func (d *drawing) messages(h int) (lines []string) {
	w := d.w - 2
	if d.Notice != "" {
		for i, l := range d.wrap(d.trouble(d.Notice, d.Fields), w-8) {
			mark := strings.Repeat(" ", 7)
			if i == 0 {
				mark = styleNotice.Render(" " + d.fit(d.code(d.Notice), 5) + " ")
			}
			lines = append(lines, mark+" "+styleBold.Render(l))
		}
	}
	if d.Ask == station.AskReason {
		var choice []string
		for i, r := range d.Reasons {
			choice = append(choice, fmt.Sprintf("%d %s", i+1, d.word("reason."+r)))
		}
		// Reasons come first when there is no room for both: without them there is nothing to answer.
		reasons := d.wrap(strings.Join(choice, "   "), w)
		lines = append(lines[:max(0, min(len(lines), h-len(reasons)))], reasons...)
	}
	if len(d.Heads) > 1 && !d.Help {
		lines = append(lines, d.troubles(w, h-len(lines))...)
	}
	for i := range lines {
		lines[i] = " " + lines[i]
	}
	return lines
}

// troubles says what is wrong on which heads, the newest first, as long as it fits; what does not fit whole is cut to what to do.
func (d *drawing) troubles(w, h int) (lines []string) {
	type trouble struct{ heads, code, says, action string }
	var all []trouble
	for _, head := range d.failing() {
		t := trouble{strconv.Itoa(head.Number), d.code(head.code()), d.trouble(head.code(), head.fields()), d.clean(d.text.Action(head.code()))}
		if i := slices.IndexFunc(all, func(o trouble) bool { return o.says == t.says }); i >= 0 {
			all[i].heads += "," + t.heads
		} else {
			all = append(all, t)
		}
	}
	for _, t := range all {
		prefix := t.heads + " " + t.code + " "
		n := ansi.StringWidth(prefix)
		says := d.wrap(t.says, w-n)
		if len(says) > h-len(lines) {
			says = d.wrap(t.action, w-n)
		}
		if len(says) > h-len(lines) {
			break
		}
		for _, l := range says {
			lines = append(lines, styleBold.Render(prefix)+l)
			prefix = strings.Repeat(" ", n)
		}
	}
	return lines
}

// shownHead adds what a head's trouble is, whether it failed or waits.
type shownHead struct{ station.Head }

func (h shownHead) code() station.Code {
	if h.State == station.HeadWaiting {
		return h.Waiting
	}
	if h.State == station.HeadFailed && h.Verdict != nil {
		return h.Verdict.Code
	}
	return ""
}

func (h shownHead) fields() map[string]string {
	if h.State == station.HeadFailed && h.Verdict != nil {
		return h.Verdict.Fields
	}
	return nil
}

// failing are the heads with a trouble: those that wait, then the newest verdicts.
func (d *drawing) failing() (heads []shownHead) {
	for _, h := range d.Heads {
		if s := (shownHead{h}); s.code() != "" {
			heads = append(heads, s)
		}
	}
	slices.SortStableFunc(heads, func(a, b shownHead) int {
		at := func(h shownHead) time.Time {
			if h.State == station.HeadFailed {
				return h.Verdict.At
			}
			return d.Now.Add(time.Hour)
		}
		return at(b).Compare(at(a))
	})
	return heads
}

// prompt is what is asked for, and the unfinished line.
func (d *drawing) prompt() string {
	ask := d.ask()
	if ask == "" {
		return d.fit("", d.w)
	}
	ask = " " + ansi.Truncate(ask, d.w*3/4, d.dotdot()) + " > "
	input := d.clean(d.input[max(0, len(d.input)-maxShown):])
	if d.dots {
		input = strings.Repeat("*", ansi.StringWidth(input))
	}
	room := d.w - ansi.StringWidth(ask)
	return styleBold.Render(ask) + d.fit(d.cut(input, room-1)+"_", room)
}

func (d *drawing) ask() string {
	function := ""
	if d.Function != "" {
		function = d.word("function." + string(d.Function))
		if d.Subject != "" {
			function += " " + d.field(d.Subject)
		}
		function += ": "
	}
	switch d.Ask {
	case station.AskNothing:
		if d.Phase == station.PhaseEnded {
			return ""
		}
		var busy []string
		for _, h := range d.Heads {
			if h.State == station.HeadWorking || h.State == station.HeadAsking || h.State == station.HeadWaiting {
				busy = append(busy, strconv.Itoa(h.Number))
			}
		}
		if d.Function == station.End && busy != nil {
			return function + d.phrase("ask.ending", map[string]string{"head": strings.Join(busy, ", ")})
		}
		return function + d.word("ask.wait")
	case station.AskConfirm:
		if d.Function == "" {
			return d.word("ask.confirm")
		}
		return d.phrase("ask."+string(d.Function), map[string]string{"serial": d.Subject}) + " " + d.word("ask.confirm")
	case station.AskLabel:
		return d.phrase("ask.label", map[string]string{"head": strconv.Itoa(d.AskHead)})
	}
	return function + d.word("ask."+string(d.Ask))
}

// lamps shows every lamp's code, and as much of what they say as there is room for.
func (d *drawing) lamps() string {
	if len(d.Lamps) == 0 {
		return d.fit("", d.w)
	}
	var codes, says []string
	for _, l := range d.Lamps {
		codes = append(codes, d.code(l))
		says = append(says, d.sentence(l, d.LampFields[l]))
	}
	c := " (!) " + strings.Join(codes, " ") + " "
	return styleWait.Render(c) + d.fit(strings.Join(says, " "), d.w-ansi.StringWidth(c))
}

type functionKey struct {
	key string
	f   station.Function
}

// functions are the keys, in their order.
var functions = []functionKey{{"F1", station.Help}, {"F2", station.Rework}, {"F3", station.Scrap}, {"F4", station.Reprint}, {"F10", station.End}, {"Esc", station.Cancel}}

func (d *drawing) keys() string {
	var parts []string
	for _, f := range functions {
		parts = append(parts, f.key+" "+d.word("function."+string(f.f)))
	}
	return styleBar.Render(d.fit(" "+strings.Join(parts, "  "), d.w))
}

func (d *drawing) help() []string {
	lines := []string{styleBold.Render("  " + d.word("function.help")), "", "  " + d.word("help.scan"), "  " + d.word("help.pass"), ""}
	for _, f := range append(slices.Clone(functions), functionKey{"Enter", station.Yes}) {
		lines = append(lines, "  "+styleBold.Render(fmt.Sprintf("%-6s", f.key))+d.fit("TM!"+string(f.f), 12)+d.word("help."+string(f.f)))
	}
	lines = append(lines, "", "  "+d.word("help.sheet"), "")
	for _, l := range d.Lamps {
		for i, s := range d.wrap(d.trouble(l, d.LampFields[l]), d.w-10) {
			mark := ""
			if i == 0 {
				mark = d.code(l)
			}
			lines = append(lines, "  "+styleWait.Render(d.fit(mark, 7))+s)
		}
	}
	return lines
}

// checks lists what the station finds out about itself. What failed says what to do, as far as there is room.
func (d *drawing) checks(w, h int) []string {
	lines := []string{styleBold.Render(" " + d.word("phase.checks")), ""}
	marks := map[station.CheckState]string{station.CheckOK: "[+]", station.CheckFailed: "[X]", station.CheckRunning: "[.]", station.CheckWaiting: "[ ]"}
	styles := map[station.CheckState]lipgloss.Style{station.CheckOK: styleGood, station.CheckFailed: styleBad, station.CheckRunning: styleWait}
	room := h - len(lines) - len(d.Checks)
	for _, c := range d.Checks {
		name := strings.TrimPrefix(d.word("check."+c.Name), "check.") // a check may have a name of its own
		state := d.word("check." + string(c.State))
		if c.Code != "" {
			state += " " + d.code(c.Code)
		}
		lines = append(lines, styles[c.State].Render(" "+marks[c.State]+" "+d.fit(name, min(24, w-28))+" "+state))
		if c.State != station.CheckFailed {
			continue
		}
		says := d.wrap(d.trouble(c.Code, c.Fields), w-6)
		if c.Detail != "" && len(says) < room {
			says = append(says, ansi.Truncate(d.clean(c.Detail), w-6, d.dotdot()))
		}
		says = says[:max(0, min(len(says), room))]
		room -= len(says)
		for _, s := range says {
			lines = append(lines, "     "+s)
		}
	}
	return lines
}

func (d *drawing) ended(w, h int) []string {
	c := d.Counts
	var list []string
	for _, n := range []struct {
		word string
		n    int64
	}{{"count.passed", c.Passed}, {"count.failed", c.Failed}, {"count.reworked", c.Reworked}, {"count.scrapped", c.Scrapped}, {"count.reprinted", c.Reprinted}} {
		list = append(list, d.middle(lipgloss.NewStyle(), d.fit(d.word(n.word), 20)+fmt.Sprintf("%8d", n.n), w))
	}
	return d.stack(h, w, []string{d.middle(styleBold, d.word("phase.ended"), w)}, list)
}

// heads lays one to eight heads out as tiles: one column for one, two for more; rows as many as it takes.
func (d *drawing) heads(w, h int) []string {
	n := len(d.Heads)
	if n == 0 {
		return nil
	}
	columns := 1
	if n > 1 {
		columns = 2
	}
	rows := (n + columns - 1) / columns
	tw, th := (w-(columns-1))/columns, h/rows
	var lines []string
	for r := range rows {
		var tiles []string
		for c := range columns {
			var tile []string
			if i := r*columns + c; i < n {
				tile = d.tile(d.Heads[i], tw, th)
			}
			if c > 0 {
				tiles = append(tiles, strings.TrimSuffix(strings.Repeat(" \n", th), "\n"))
			}
			tiles = append(tiles, strings.Join(d.exactly(tile, th, tw), "\n"))
		}
		lines = append(lines, strings.Split(lipgloss.JoinHorizontal(lipgloss.Top, tiles...), "\n")...)
	}
	return lines
}

// tile is one head: a title, and under it what can be read from two metres.
func (d *drawing) tile(head station.Head, w, h int) []string {
	v := head.Verdict
	if v == nil && (head.State == station.HeadPassed || head.State == station.HeadFailed) {
		v = &station.Verdict{Serial: head.Serial, Pass: head.State == station.HeadPassed, Code: station.CodeInternal}
	}
	b := max(0, h-1)
	block := func(words []string, style lipgloss.Style) []string {
		var out []string
		for _, l := range words {
			out = append(out, d.middle(style, l, w))
		}
		return out
	}
	plain := lipgloss.NewStyle()
	switch head.State {
	case station.HeadPassed:
		var extra []string
		if v.DryRun {
			extra = append(extra, d.word("label.dryrun"))
		}
		if v.Attempt > 1 {
			extra = append(extra, d.phrase("label.try", map[string]string{"try": strconv.Itoa(v.Attempt)}))
		}
		letters := bigIn("PASS", w, b-len(extra), d.ascii, scales[0])
		if letters == nil {
			letters = bigIn("PASS", w, b, d.ascii, scales[0])
		}
		if letters == nil {
			letters = d.sign("P A S S", '+', w, b)
		}
		return append([]string{d.title(head, v.Serial, seconds(v.Seconds)+" s", w)},
			d.stack(b, w, block(letters, styleGood), block(extra, plain))...)

	case station.HeadFailed:
		letters, code, says := d.failed(v, w, b)
		corner := seconds(v.Seconds) + " s"
		if code == nil {
			corner = d.code(v.Code)
		}
		return append([]string{d.title(head, v.Serial, corner, w)},
			d.stack(b, w, block(letters, styleBad), block(code, styleBad), says)...)

	case station.HeadWaiting:
		shown := shownHead{head}
		says := d.wrap(d.trouble(shown.code(), nil), w)
		if len(says) > b-5 {
			says = nil // it stands among the messages
		}
		letters := bigIn(string(shown.code()), w, b-len(says)-1, d.ascii, scale{2, 2})
		if letters == nil {
			letters = []string{d.code(shown.code())}
		}
		return append([]string{d.title(head, head.Serial, d.elapsed(head.Started), w)},
			d.stack(b, w, []string{d.middle(styleWait, "... "+d.word("head.waiting")+" ...", w)}, block(letters, styleWait), block(says, plain))...)

	case station.HeadAsking:
		sign := d.sign(d.word("head.asking"), '?', w, min(b, 3))
		return append([]string{d.title(head, head.Serial, d.elapsed(head.Started), w)}, d.stack(b, w, block(sign, styleWait))...)

	case station.HeadWorking:
		step := d.word("step." + string(head.Step))
		k := fmt.Sprintf("%d/%d", head.Index, head.Of)
		timer := d.elapsed(head.Stepped)
		name := d.fit(k+" "+step, w-len(timer)-1) + " " + timer
		most := scale{2, 2} // a verdict is larger
		if d.h >= 40 && len(d.Heads) == 1 {
			most = scale{4, 4}
		}
		letters := bigIn(k, w, b-3, d.ascii, most)
		return append([]string{d.title(head, head.Serial, d.elapsed(head.Started), w)},
			d.stack(b, w, block(letters, styleBold), []string{styleBold.Render(name), d.progress(head.Index-1, head.Of, w)})...)
	}
	state := d.word("head." + string(head.State))
	return append([]string{d.title(head, head.Serial, "", w)}, d.stack(b, w, []string{d.middle(plain, state, w)})...)
}

// failed chooses how large FAIL and its code can be, and how much can be said beside them. The code is nil where it has to go into
// the title.
func (d *drawing) failed(v *station.Verdict, w, h int) (letters, code, says []string) {
	sentence := d.wrap(d.sentence(v.Code, v.Fields), w)
	action := d.wrap(d.clean(d.text.Action(v.Code)), w)
	for i := range action {
		action[i] = styleBold.Render(action[i])
	}
	if v.DryRun {
		sentence = append([]string{d.word("label.dryrun")}, sentence...)
	}
	for _, says := range [][]string{append(slices.Clone(sentence), action...), action, nil} {
		for _, at := range scales {
			letters := bigIn("FAIL", w, h-len(says), d.ascii, at)
			if letters == nil {
				continue
			}
			if code := bigIn(string(v.Code), w, h-len(says)-len(letters), d.ascii, at); code != nil {
				return letters, code, says
			}
		}
	}
	if letters = bigIn("FAIL", w, h-1, d.ascii, scales[0]); letters != nil {
		return letters, []string{d.code(v.Code)}, nil
	}
	if letters = bigIn("FAIL", w, h, d.ascii, scales[0]); letters != nil {
		return letters, nil, nil
	}
	return d.sign("F A I L  "+d.code(v.Code), '#', w, h), []string{}, nil
}

// sign is a word in a frame, where block letters do not fit: its filling tells PASS from FAIL without colour or letters.
func (d *drawing) sign(word string, filling byte, w, h int) []string {
	word = ansi.Truncate(word, w-4, d.dotdot())
	edge := strings.Repeat(string(filling), w)
	side := strings.Repeat(string(filling), max(1, min(3, (w-ansi.StringWidth(word)-2)/2)))
	inner := w - 2*len(side)
	left := (inner - ansi.StringWidth(word)) / 2
	mid := side + d.fit(strings.Repeat(" ", left)+word, inner) + side
	if h < 3 {
		return []string{mid}
	}
	return []string{edge, mid, edge}
}

// title names a head and its unit: "2 SN-000123 ---- 12 s".
func (d *drawing) title(head station.Head, serial, corner string, w int) string {
	left := strconv.Itoa(head.Number) + " "
	if len(d.Heads) == 1 {
		left = ""
	}
	if corner != "" {
		corner = " " + corner
	}
	if serial != "" {
		room := w - len(left) - ansi.StringWidth(corner) - 2
		left += d.cut(d.clean(serial), room) + " "
	}
	return styleBold.Render(left + d.rule(w-ansi.StringWidth(left)-ansi.StringWidth(corner)) + corner)
}

func (d *drawing) progress(done, of, w int) string {
	w -= 2
	full, empty := "#", "."
	if !d.ascii {
		full, empty = "█", "░"
	}
	n := 0
	if of > 0 {
		n = min(max(w*done/of, 0), w)
	}
	return "[" + strings.Repeat(full, n) + strings.Repeat(empty, w-n) + "]"
}

func (d *drawing) elapsed(since time.Time) string {
	if since.IsZero() {
		return ""
	}
	return seconds(max(0, d.Now.Sub(since).Seconds())) + " s"
}

// seconds is a time in at most four columns.
func seconds(s float64) string {
	if s >= 9999 {
		return "9999"
	}
	return strconv.Itoa(int(s + 0.5))
}

// small is for a terminal that is too small: it says so, and still shows verdicts, codes and the input.
func (d *drawing) small() []string {
	lines := d.wrap(d.phrase("label.small", map[string]string{"size": fmt.Sprintf("%dx%d", d.w, d.h), "need": fmt.Sprintf("%dx%d", minWidth, minHeight)}), d.w)
	if d.DryRun {
		lines = append(lines, d.word("label.dryrun"))
	}
	for _, h := range d.Heads {
		style, says, serial := lipgloss.NewStyle(), d.word("head."+string(h.State)), h.Serial
		switch {
		case h.State == station.HeadPassed:
			style, says = styleGood, "PASS"
		case h.State == station.HeadFailed:
			style, says = styleBad, "FAIL "+d.code(shownHead{h}.code())
		case h.State == station.HeadWaiting:
			style, says = styleWait, says+" "+d.code(h.Waiting)
		case h.State == station.HeadWorking:
			says = fmt.Sprintf("%d/%d %s", h.Index, h.Of, d.word("step."+string(h.Step)))
		}
		if h.Verdict != nil && serial == "" {
			serial = h.Verdict.Serial
		}
		lines = append(lines, style.Render(d.fit(fmt.Sprintf("%d %s %s", h.Number, says, d.clean(serial)), d.w)))
	}
	for _, c := range d.Checks {
		if d.Phase == station.PhaseChecks && c.State == station.CheckFailed {
			lines = append(lines, styleBad.Render(d.fit(fmt.Sprintf("%s %s", d.code(c.Code), d.word("check."+c.Name)), d.w)))
		}
	}
	if d.Notice != "" {
		lines = append(lines, d.wrap(d.code(d.Notice)+" "+d.trouble(d.Notice, d.Fields), d.w)...)
	}
	if d.Ask == station.AskReason {
		for i, r := range d.Reasons {
			lines = append(lines, fmt.Sprintf("%d %s", i+1, d.word("reason."+r)))
		}
	}
	return append(d.exactly(lines, max(0, d.h-1), d.w), ansi.Truncate(d.prompt(), d.w, ""))
}

// stack puts blocks one under another into h lines, apart and in the middle where there is room.
func (d *drawing) stack(h, w int, blocks ...[]string) []string {
	blocks = slices.DeleteFunc(blocks, func(b []string) bool { return len(b) == 0 })
	n := 0
	for _, b := range blocks {
		n += len(b)
	}
	gap := 0
	if h-n >= len(blocks)-1 {
		gap, n = 1, n+len(blocks)-1
	}
	lines := make([]string, max(0, (h-n)/2))
	for i, b := range blocks {
		if i > 0 && gap > 0 {
			lines = append(lines, "")
		}
		lines = append(lines, b...)
	}
	return d.exactly(lines, h, w)
}

// exactly makes lines h long and w wide.
func (d *drawing) exactly(lines []string, h, w int) []string {
	out := make([]string, h)
	for i := range out {
		l := ""
		if i < len(lines) {
			l = lines[i]
		}
		if ansi.StringWidth(l) > w {
			l = ansi.Truncate(l, w, d.dotdot())
		}
		out[i] = l + strings.Repeat(" ", w-ansi.StringWidth(l))
	}
	return out
}

// fit cuts or pads plain s to w columns.
func (d *drawing) fit(s string, w int) string {
	if w = max(w, 0); ansi.StringWidth(s) > w {
		s = ansi.Truncate(s, w, d.dotdot())
	}
	return s + strings.Repeat(" ", max(0, w-ansi.StringWidth(s)))
}

// cut takes from plain s what is over w columns, in front: of serials the end matters.
func (d *drawing) cut(s string, w int) string {
	if n := ansi.StringWidth(s); n > w {
		s = ansi.TruncateLeft(s, n-w+1, d.dotdot())
	}
	return s
}

func (d *drawing) middle(style lipgloss.Style, s string, w int) string {
	return strings.Repeat(" ", max(0, (w-ansi.StringWidth(s))/2)) + style.Render(s)
}

func (d *drawing) wrap(s string, w int) []string {
	return strings.Split(ansi.Wrap(s, max(w, 1), ""), "\n")
}

func (d *drawing) dotdot() string {
	if d.ascii {
		return "~"
	}
	return "…"
}

func (d *drawing) word(key string) string { return d.clean(d.text.Word(key)) }

func (d *drawing) phrase(key string, fields map[string]string) string {
	return d.clean(d.text.Phrase(key, d.fields(fields)))
}

func (d *drawing) sentence(c station.Code, fields map[string]string) string {
	return d.clean(d.text.Sentence(c, d.fields(fields)))
}

// trouble is a code's sentence with its action.
func (d *drawing) trouble(c station.Code, fields map[string]string) string {
	s := d.sentence(c, fields)
	if !strings.HasSuffix(s, "。") { // which has its space in it
		s += " "
	}
	return s + d.clean(d.text.Action(c))
}

func (d *drawing) fields(in map[string]string) map[string]string {
	out := make(map[string]string, len(in))
	for k, v := range in {
		out[k] = d.field(v)
	}
	return out
}

// code is a code, from outside like everything else in a view.
func (d *drawing) code(c station.Code) string {
	return ansi.Truncate(d.clean(string(c)), 5, d.dotdot())
}

// field is a value from outside as part of a sentence.
func (d *drawing) field(s string) string { return ansi.Truncate(d.clean(s), maxField, d.dotdot()) }

// clean makes what comes from outside (untrusted) harmless to a terminal: nothing but characters that are seen, take one or two
// columns and run from left to right.
func (d *drawing) clean(s string) string {
	if len(s) > maxShown {
		s = s[:maxShown]
	}
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) || unicode.In(r, unicode.Mn, unicode.Me, unicode.Variation_Selector) ||
			unicode.In(r, unicode.Hebrew, unicode.Arabic, unicode.Syriac, unicode.Thaana, unicode.Nko) {
			return '?'
		}
		return r
	}, norm.NFC.String(s))
	return d.fold(s)
}

// fold spells plain s in ASCII where the terminal knows nothing else.
func (d *drawing) fold(s string) string {
	if !d.ascii {
		return s
	}
	var b strings.Builder
	for _, r := range norm.NFD.String(asciiSpelling.Replace(s)) {
		switch {
		case r < unicode.MaxASCII:
			b.WriteRune(r)
		case !unicode.Is(unicode.Mn, r):
			b.WriteByte('?')
		}
	}
	return b.String()
}

var asciiSpelling = strings.NewReplacer("ä", "ae", "ö", "oe", "ü", "ue", "Ä", "Ae", "Ö", "Oe", "Ü", "Ue", "ß", "ss", "đ", "d", "Đ", "D", "¿", "", "¡", "")
