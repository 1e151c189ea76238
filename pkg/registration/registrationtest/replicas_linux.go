package registrationtest

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// Replicas starts fixtures at three replicas, each on a store of its own, on one new database. Enrollments are written at the first.
//
// One answers as another does, but for this, which is by design (help topics store, limits and monitoring): a device may hear for ten
// seconds of an operation whose registration was deleted at another replica; a scope that was asked for before it was made may be
// unknown for a second; rates are each replica's own; and attempts and usage of the last seconds are missing at the others.
func Replicas(server *sqlstoretest.Server) Fresh {
	return func(t testing.TB, hubs ...string) *Fixture {
		t.Helper()
		dsn := server.Database(t)
		open := func() *sqlstore.Store {
			s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: dsn, DataKey: bytes.Repeat([]byte{7}, 32)})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return s
		}
		f := NewFixtureOn(t, open(), hubs...)
		for range 2 {
			other := *f
			other.Store, other.others = open(), nil
			other.Service = other.Replica(hubs...)
			f.others = append(f.others, &other)
		}
		return f
	}
}

var testForm = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)

// Again runs the tests of a package once more, below a test of its own and beside each other: all that there are, but for those that
// alone names, with the reason.
func Again(t *testing.T, alone map[string]string, tests ...func(*testing.T)) {
	named := make(map[string]bool)
	for _, test := range tests {
		_, name, _ := strings.Cut(filepath.Base(runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()), ".")
		named[name] = true
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range testForm.FindAllSubmatch(text, -1) {
			if name := string(f[1]); name != t.Name() && named[name] == (alone[name] != "") {
				t.Errorf("%s is to run again, or somebody says why not", name)
			}
		}
	}
}
