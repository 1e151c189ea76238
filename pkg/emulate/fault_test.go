package emulate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

func TestParseFault(t *testing.T) {
	for _, text := range []string{
		"rid=sensor-*,code=429,count=2", "delay=2s", "lost", "drop", "drop=after,op=register", "retry-after=banana", "retry-after=-1,assigning=3",
		"code=503,retry-after=none", "disabled,rid=a?|B*", "failed=400208", "hub=hub-b.example.net,protocol=mqtt|mqtt-ws", "code=401002,p=0.5,after=0", "nth=3,code=500",
		"drop=before,delay=250ms",
	} {
		f, err := emulate.ParseFault(text)
		if err != nil || f.String() != text {
			t.Errorf("%s: %v, %v", text, f, err)
		}
	}
	for text, want := range map[string]struct {
		at     int // from 1
		reason string
	}{
		"":                             {1, "KEY=VALUE is missing; the keys are rid="},
		"rid=x,cod=429":                {7, `no key "cod"; the keys are`},
		"rid=x":                        {6, "not what"},
		"rid=x,":                       {7, "is missing"},
		"rid=x,,lost":                  {7, "is missing"},
		"rid,lost":                     {4, "rid wants a value"},
		"rid=,lost":                    {5, "the value of rid is missing"},
		"lost=1":                       {6, "takes no value"},
		"disabled=":                    {10, "value of disabled is missing"},
		"rid=a,rid=b,lost":             {7, "stands twice"},
		"rid=sensor[1-3],lost":         {5, "no pattern"},
		"rid=a||b,lost":                {5, "no pattern"},
		"op=ask,lost":                  {4, `"ask" is not one of register`},
		"protocol=http,lost":           {10, "not one of https"},
		"lost,code=429":                {6, "exclude each other"},
		"code=200":                     {6, "HTTP status from 400"},
		"code=4290":                    {6, "HTTP status from 400"},
		"code=+429":                    {6, "HTTP status from 400"},
		"count=0,lost":                 {7, "from 1"},
		"count=01,lost":                {7, "whole number"},
		"after=-1,lost":                {7, "from 0"},
		"nth=1,count=2,lost":           {1, "nth stands for"},
		"p=0,lost":                     {3, "above 0"},
		"p=1.5,lost":                   {3, "above 0"},
		"p=NaN,lost":                   {3, "above 0"},
		"p=1e-1,lost":                  {3, "above 0"},
		"delay=2":                      {7, "such as 250ms"},
		"delay=-2s":                    {7, "such as 250ms"},
		"delay=11m":                    {7, "up to 10m"},
		"retry-after=a&b":              {13, "letters, digits"},
		"retry-after=1\r\nX:y":         {13, "letters, digits"},
		"retry-after=5,lost":           {1, "has no hint"},
		"code=401,retry-after=5":       {10, "only 429 and 5xx"},
		"drop=during":                  {6, "before or after"},
		"assigning=x":                  {11, "whole number"},
		"hub=https://h":                {5, "host name"},
		"op=register,lost":             {1, "cannot happen to register, only to status"},
		"op=challenge|status,disabled": {1, "cannot happen to challenge"},
		"rid=" + strings.Repeat("a", 2000) + ",lost": {1025, "more than 1024"},
		" rid=x,lost": {1, `no key " rid"`},
	} {
		_, err := emulate.ParseFault(text)
		var fe *emulate.FaultError
		if !errors.As(err, &fe) || fe.Offset+1 != want.at || !strings.Contains(fe.Reason, want.reason) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// What is taken is taken again as it prints, and what is not says where.
func FuzzFault(f *testing.F) {
	f.Add("rid=sensor-*,code=429,count=2")
	f.Add("op=status|register,assigning=3,retry-after=none,p=0.25,after=7")
	f.Add("drop=after,delay=1h,hub=\x00")
	f.Add("nth=,=,lost=lost")
	f.Fuzz(func(t *testing.T, text string) {
		fault, err := emulate.ParseFault(text)
		var fe *emulate.FaultError
		if err != nil {
			if !errors.As(err, &fe) || fe.Offset < 0 || fe.Offset > len(text) || len(err.Error()) > 4*1024 {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		again, err := emulate.ParseFault(fault.String())
		if err != nil || fmt.Sprintf("%#v", again) != fmt.Sprintf("%#v", fault) {
			t.Fatalf("%q: %#v, then %#v, %v", text, fault, again, err)
		}
		b, err := json.Marshal([]emulate.Fault{fault})
		var list []emulate.Fault
		if err != nil || json.Unmarshal(b, &list) != nil || len(list) != 1 {
			t.Fatalf("%q: %s, %v", text, b, err)
		}
	})
}

const hub = "hub-a.example.net"

// bench is a service behind faults.
type bench struct {
	*registrationtest.Fixture
	*emulate.Registrar
	faults *emulate.Faults
}

func newBench(t testing.TB, seed emulate.Seed, faults ...string) *bench {
	t.Helper()
	f := registrationtest.NewFixture(t, hub)
	b := &bench{Fixture: f, faults: emulate.NewFaults(seed)}
	b.Registrar = emulate.New(emulate.Config{Registrar: f.Service, Faults: b.faults})
	b.set(t, faults...)
	return b
}

func (b *bench) set(t testing.TB, texts ...string) {
	t.Helper()
	list := make([]emulate.Fault, len(texts))
	for i, text := range texts {
		var err error
		if list[i], err = emulate.ParseFault(text); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.faults.Set(list...); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) request(id, protocol string) *registration.Request {
	d := b.Derived(id)
	return &registration.Request{IDScope: d.Scope, RegistrationID: id, APIVersion: d.APIVersion, Protocol: protocol, Proof: attest.Proof{Token: d.Token}}
}

// outcome is what a device that registers and polls reads, in short: a line for each answer.
func (b *bench) outcome(t testing.TB, id, protocol string, polls int) string {
	t.Helper()
	var out []string
	say := func(answer any, err error) {
		if errors.Is(err, registration.ErrHangUp) {
			out = append(out, "hung up")
			return
		}
		r := dps.NewReply(answer, err)
		var doc struct {
			ErrorCode int
			Status    dps.Status
			State     *dps.RegistrationState `json:"registrationState"`
		}
		if err := json.Unmarshal(r.Body, &doc); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprint(r.Status)
		for _, s := range []string{r.RetryAfter, string(doc.Status)} {
			if s != "" {
				text += " " + s
			}
		}
		if doc.ErrorCode != 0 {
			text += fmt.Sprint(" ", doc.ErrorCode)
		}
		if s := doc.State; s != nil {
			if s.Status != doc.Status || s.RegistrationID != id || (s.Status == dps.Assigned) != (s.AssignedHub != "" && s.DeviceID != "") || (s.Status == dps.Failed) != (s.ErrorMessage != "") {
				t.Errorf("state %+v", s)
			}
			if s.ErrorCode != 0 {
				text += fmt.Sprint(" ", s.ErrorCode)
			}
			if s.AssignedHub != "" && s.AssignedHub != hub {
				text += " " + s.AssignedHub
			}
		}
		out = append(out, text)
	}
	req := b.request(id, protocol)
	st, err := b.Register(t.Context(), req)
	say(st, err)
	if err != nil {
		// The device has an operation from before, perhaps.
		st, _ = b.Service.Register(t.Context(), req)
	}
	for range polls {
		st, err := b.Status(t.Context(), req, st.OperationID)
		say(st, err)
	}
	return strings.Join(out, "; ")
}

// Every fault as a device reads it.
func TestFaults(t *testing.T) {
	b := newBench(t, nil)
	for _, x := range []struct {
		faults []string
		want   string
	}{
		{nil, "202 3 assigning; 200 assigned; 200 assigned"},
		{[]string{"code=429,count=1"}, "429 3 429001; 200 assigned; 200 assigned"},
		{[]string{"code=429,count=1,retry-after=banana"}, "429 banana 429001; 200 assigned; 200 assigned"},
		{[]string{"code=503,nth=2,retry-after=none"}, "202 3 assigning; 503 503000; 200 assigned"},
		{[]string{"code=401002,op=status"}, "202 3 assigning; 401 401002; 401 401002"},
		{[]string{"code=401,after=2"}, "202 3 assigning; 200 assigned; 401 401002"},
		{[]string{"lost,count=1"}, "202 3 assigning; 404 404000; 200 assigned"},
		{[]string{"drop,nth=2"}, "202 3 assigning; hung up; 200 assigned"},
		{[]string{"drop=after,count=1"}, "hung up; 200 assigned; 200 assigned"},
		{[]string{"retry-after=0"}, "202 0 assigning; 200 assigned; 200 assigned"},
		{[]string{"retry-after=none"}, "202 assigning; 200 assigned; 200 assigned"},
		{[]string{"retry-after=86400", "code=500,nth=3"}, "202 86400 assigning; 200 assigned; 500 3 500000"},
		{[]string{"assigning=1"}, "202 3 assigning; 202 3 assigning; 200 assigned"},
		{[]string{"assigning=1,retry-after=-1", "hub=other.example.net"}, "202 3 assigning; 202 -1 assigning; 200 assigned other.example.net"},
		{[]string{"failed=400208,count=1", "assigning=1"}, "202 3 assigning; 202 3 assigning; 200 failed 400208"},
		{[]string{"disabled"}, "202 3 assigning; 200 disabled; 200 disabled"},
		{[]string{"failed=400209,nth=2"}, "202 3 assigning; 200 assigned; 200 failed 400209"},
		{[]string{"hub=h1.example", "hub=h2.example"}, "202 3 assigning; 200 assigned h2.example; 200 assigned h2.example"},
		{[]string{"rid=dev-2,code=500"}, "202 3 assigning; 200 assigned; 200 assigned"},
		{[]string{"rid=x|DEV-*,code=500,op=register"}, "500 3 500000; 200 assigned; 200 assigned"},
		{[]string{"protocol=https,lost"}, "202 3 assigning; 200 assigned; 200 assigned"},
		{[]string{"protocol=amqp|mqtt,lost"}, "202 3 assigning; 404 404000; 404 404000"},
	} {
		b.set(t, x.faults...)
		if got := b.outcome(t, "dev-1", "mqtt", 2); got != x.want {
			t.Errorf("%v:\n%s, want\n%s", x.faults, got, x.want)
		}
	}
	// Lookups and challenges.
	b.set(t, "op=lookup,disabled", "op=challenge,code=500")
	if st, err := b.Lookup(t.Context(), b.request("dev-1", "https")); err != nil || st.Status != dps.Disabled || st.AssignedHub != "" {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := b.Challenge(t.Context(), b.request("dev-1", "https")); dps.AsError(err).Code != dps.CodeInternal {
		t.Error(err)
	}
	// What the service says is left alone behind the faults: it keeps answers, and others read them.
	b.set(t, "hub=h1.example", "retry-after=9")
	b.outcome(t, "dev-1", "mqtt", 1)
	b.set(t)
	if got := b.outcome(t, "dev-1", "mqtt", 1); got != "202 3 assigning; 200 assigned" {
		t.Error(got)
	}
	// A refusal of the service's own is none of an outcome's business.
	b.set(t, "disabled", "retry-after=7", "assigning=1")
	if _, err := b.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "dev-1"}); dps.AsError(err).Code != dps.CodeUnauthorized || dps.AsError(err).RetryAfter != "" {
		t.Error(err)
	}
	for _, s := range b.faults.List() {
		if s.Matched != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// Counts are told, and Set and Add bound the list.
func TestFaultList(t *testing.T) {
	b := newBench(t, nil, "op=status,after=1,code=500,count=2", "assigning=2")
	b.outcome(t, "dev-1", "https", 5)
	list := b.faults.List()
	if len(list) != 2 || list[0].Matched != 5 || list[0].Applied != 2 || list[1].Matched != 1 || list[1].Applied != 1 {
		t.Errorf("%+v", list)
	}
	if err := b.faults.Add(slices.Repeat([]emulate.Fault{list[0].Fault}, emulate.MaxFaults-1)...); !errors.Is(err, emulate.ErrTooMany) || len(b.faults.List()) != 2 {
		t.Error(err)
	}
	if err := b.faults.Set(slices.Repeat([]emulate.Fault{list[0].Fault}, emulate.MaxFaults+1)...); !errors.Is(err, emulate.ErrTooMany) || b.faults.List()[0].Matched != 5 {
		t.Error(err)
	}
}

// Chance is the same under one seed, another one under another, and about as often as asked for.
func TestChance(t *testing.T) {
	draw := func(seed string) string {
		s, err := emulate.NewSeed(seed)
		if err != nil {
			t.Fatal(err)
		}
		b := newBench(t, s, "p=0.25,code=500,op=challenge")
		var out []byte
		for range 400 {
			_, err := b.Challenge(t.Context(), b.request("dev-1", "https"))
			out = append(out, "-x"[map[bool]int{true: 1}[dps.AsError(err).Code == dps.CodeInternal]])
		}
		return string(out)
	}
	a, again, other := draw("one"), draw("one"), draw("two")
	if n := strings.Count(a, "x"); a != again || a == other || n < 60 || n > 140 {
		t.Errorf("%d of 400\n%s\n%s\n%s", n, a, again, other)
	}
}

// A delay ends with its time, with the device's patience, and when the service stops.
func TestDelay(t *testing.T) {
	f := registrationtest.NewFixture(t, hub)
	stop := make(chan struct{})
	b := &bench{Fixture: f, faults: emulate.NewFaults(nil)}
	b.Registrar = emulate.New(emulate.Config{Registrar: f.Service, Faults: b.faults, Stop: stop})
	b.set(t, "delay=20ms,count=1", "delay=30ms,count=1")
	begin := time.Now()
	if _, err := b.Register(t.Context(), b.request("dev-1", "https")); err != nil || time.Since(begin) < 50*time.Millisecond {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	b.set(t, "delay=10m")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, _ = b.Register(ctx, b.request("dev-1", "https"))
	close(stop)
	if _, err := b.Register(t.Context(), b.request("dev-1", "https")); err != nil {
		t.Error(err)
	}
}

// Without faults and exchanges the registrar is the service's, octet by octet.
func TestNothing(t *testing.T) {
	f := registrationtest.NewFixture(t, hub)
	b := &bench{Fixture: f}
	b.Registrar = emulate.New(emulate.Config{Registrar: f.Service})
	req := b.request("dev-1", "https")
	st, err := b.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	one, _ := b.Status(t.Context(), req, st.OperationID)
	two, _ := f.Service.Status(t.Context(), req, st.OperationID)
	if a, b := dps.NewReply(one, nil), dps.NewReply(two, nil); !bytes.Equal(a.Body, b.Body) || a.Status != 200 {
		t.Errorf("%s, %s", a.Body, b.Body)
	}
	if st, err := b.Status(t.Context(), req, "5.nothing"); st != nil || dps.AsError(err).Code != dps.CodeNotFound {
		t.Errorf("%v, %v", st, err)
	}
}
