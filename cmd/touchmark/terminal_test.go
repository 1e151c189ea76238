package main

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// What comes from outside cannot move the cursor, change colours, or turn text round; our own colours stay.
func TestTerminalIsNotToldByStrangers(t *testing.T) {
	var out, errs bytes.Buffer
	a := &app{stdio: stdio{out: &out, err: &errs, env: func(string) (string, bool) { return "", false }}, color: "always"}
	if err := a.table(nil, [][]string{{"Hub", "a\x1b[2J\u202e\rb"}, {"State", a.paint(a.out, "32", "fine\x1b[31m")}}); err != nil {
		t.Fatal(err)
	}
	if want := "Hub    a[2Jb\nState  \x1b[32mfine[31m\x1b[0m\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	a.color = "never"
	a.report(context.Background(), errors.New("the service said \x1b]0;owned\x07\nand this"))
	if want := "touchmark: error: the service said ]0;owned\ntouchmark: error: and this\n"; errs.String() != want {
		t.Errorf("%q, want %q", errs.String(), want)
	}
}
