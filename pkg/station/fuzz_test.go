package station_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/templates"
)

func FuzzReadConfig(f *testing.F) {
	f.Add(templates.Station())
	f.Add(strings.ReplaceAll(templates.Station(), "\n# ", "\n"))
	f.Fuzz(func(t *testing.T, in string) {
		if c, err := station.ReadConfig("station.toml", strings.NewReader(in)); err == nil && (c.Heads < 1 || len(c.Steps()) < 2) {
			t.Errorf("%+v", c)
		}
	})
}

func FuzzReadOperators(f *testing.F) {
	o := &station.Operators{}
	if err := o.Add("Mai", "badge-1", "1234", true); err != nil {
		f.Fatal(err)
	}
	b, err := o.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(b))
	f.Fuzz(func(t *testing.T, in string) {
		o, err := station.ReadOperators("operators.toml", strings.NewReader(in))
		if err != nil {
			return
		}
		for i := range o.Operator {
			if p := o.Operator[i]; p.PIN != "" && len(p.PIN) < 40 && p.CheckPIN("1234") == nil {
				t.Errorf("a PIN without a hash lets everybody in: %+v", p)
			}
		}
	})
}

// A machine may say anything: the station answers or refuses, and is not stopped by it.
func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"id":"1","op":"make","serial":"SN1","head":1}` + "\n" + `{"op":"wait"}` + "\n" + `{"op":"status"}` + "\n" + `{"op":"scrap","serial":"x","reason":"damaged"}`))
	f.Add([]byte(`{"op":"scan","text":"TM1.SN1"}` + "\n" + `{"op":"cancel","head":-1}` + "\n" + `{"op":"reprint","serial":"\u0000"}` + "\n" + `{"op":"end"}`))
	cfg, err := station.ReadConfig("station.toml", strings.NewReader("profile = \"p\"\nheads = 2"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		s := station.New(cfg, station.Setup{Name: "s", Out: t.TempDir(), Open: func(context.Context, string, string) (*station.Work, error) {
			return nil, errors.New("no line")
		}})
		if err := s.Serve(t.Context(), bytes.NewReader(in), io.Discard); err != nil && !strings.Contains(err.Error(), "too long") {
			t.Error(err)
		}
		if s.Busy() {
			t.Error("a head is left at work")
		}
	})
}
