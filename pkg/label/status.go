package label

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// hostStatus asks a ZPL printer how it is (ZPL II Programming Guide, ~HS). The answer is three lines, each from STX to ETX CR LF, of
// numbers with commas between. It comes in order, so after a label it also says that the printer has read that.
func hostStatus(c io.ReadWriter) error {
	if _, err := io.WriteString(c, "~HS\r\n"); err != nil {
		return fmt.Errorf("asking for its status: %w", err)
	}
	// Untrusted. One octet at a time: what comes behind the answer is not ours to take.
	const most = 256
	var answer []byte
	b := make([]byte, 1)
	for read := 0; bytes.Count(answer, []byte{'\x03'}) < 3 && read < most; read++ {
		n, err := c.Read(b)
		if answer = append(answer, b[:n]...); len(answer) == n {
			answer = bytes.TrimLeft(answer, "\r\n") // the end of an earlier answer
		}
		var timeout net.Error
		switch {
		case err == nil:
		case len(answer) == 0 && errors.As(err, &timeout) && timeout.Timeout():
			// Some printers do not while they need a hand, the guide says.
			return fmt.Errorf("it does not answer when asked for its status: labels or ribbon out, head open, "+
				"or not a ZPL printer (?status=none): %w", err)
		default:
			return fmt.Errorf("reading its status: %w", err)
		}
	}
	return parseStatus(string(answer))
}

// parseStatus judges the answer.
func parseStatus(answer string) error {
	var lines [][]string
	for _, line := range strings.SplitAfter(answer, "\x03") {
		line = strings.TrimLeft(line, "\r\n")
		if line == "" {
			continue
		}
		body, stx := strings.CutPrefix(line, "\x02")
		body, etx := strings.CutSuffix(body, "\x03")
		if !stx || !etx || strings.Trim(body, "0123456789,") != "" {
			return fmt.Errorf("its status is not what a ZPL printer says: %.100q", answer)
		}
		lines = append(lines, strings.Split(body, ","))
	}
	if len(lines) != 3 || len(lines[0]) != 12 || len(lines[1]) != 11 || len(lines[2]) != 2 {
		return fmt.Errorf("its status is not what a ZPL printer says: %.100q", answer)
	}
	on := func(s string) bool { return strings.Trim(s, "0") != "" }
	first, second := lines[0], lines[1]
	var hands, faults []string
	for _, flag := range []struct {
		set  bool
		list *[]string
		text string
	}{
		{on(second[2]), &hands, "the head is open: close it"},
		{on(first[1]), &hands, "it is out of labels: put a new roll in"},
		// Ribbon counts where it is used: the second flag is thermal transfer mode.
		{on(second[3]) && on(second[4]), &hands, "it is out of ribbon: put a new one in"},
		{on(first[2]), &hands, "it is paused: press PAUSE"},
		{on(first[5]), &faults, "its buffer is full"},
		{on(first[6]), &faults, "it is in diagnostic mode: switch it off and on"},
		{on(first[9]), &faults, "it has lost its configuration"},
		{on(first[11]), &faults, "its head is too hot: let it cool"},
	} {
		if flag.set {
			*flag.list = append(*flag.list, flag.text)
		}
	}
	all := strings.Join(append(hands, faults...), "; ")
	switch {
	case len(hands) > 0:
		return fmt.Errorf("%w: %s", ErrPaper, all)
	case len(faults) > 0:
		return errors.New(all)
	}
	return nil
}
