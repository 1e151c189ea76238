package sqlstore_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

var key = bytes.Repeat([]byte{7}, 32)

func open(t testing.TB, path string) *sqlstore.Store {
	t.Helper()
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: path, DataKey: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestContract(t *testing.T) {
	registrationtest.Run(t, func(t *testing.T) registration.Store { return open(t, filepath.Join(t.TempDir(), "s.db")) })
}

// Invariant 5: secrets are encrypted on disk, and open with their own key and in their own row only.
func TestSecretsAtRest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: path, DataKey: key})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		return tx.PutRecord("scope", &registration.Record{Kind: registration.Group, ID: "g", Document: []byte("{}"), Keys: []byte("very secret words"), Symmetric: true})
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(path + "*")
	for _, f := range files {
		if b, err := os.ReadFile(f); err != nil || bytes.Contains(b, []byte("secret words")) {
			t.Errorf("%s shows the secret, or %v", f, err)
		}
	}
	other, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: path, DataKey: bytes.Repeat([]byte{8}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() })
	err = other.View(t.Context(), func(tx registration.Tx) error {
		_, err := tx.Record("scope", registration.Group, "g")
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "data key") {
		t.Errorf("with another data key: %v", err)
	}
	if _, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: path, DataKey: key[1:]}); err == nil {
		t.Error("a short data key")
	}
}

// Invariant 3: what was acknowledged survives kill -9 at once afterwards. The child writes until it is killed, and tells of
// each acknowledgement.
func TestKill(t *testing.T) {
	if path := os.Getenv("SQLSTORE_TEST_CHILD"); path != "" {
		s, err := sqlstore.Open(context.Background(), sqlstore.Config{Path: path, DataKey: key})
		if err != nil {
			panic(err)
		}
		var mu sync.Mutex
		for w := range 8 {
			go func() {
				for i := 0; ; i++ {
					id := fmt.Sprintf("dev-%d-%d", w, i)
					if err := s.Update(context.Background(), func(tx registration.Tx) error { return tx.PutDevice("scope", &registration.Device{ID: id}) }); err != nil {
						panic(err)
					}
					mu.Lock()
					fmt.Println(id)
					mu.Unlock()
				}
			}()
		}
		select {}
	}
	path := filepath.Join(t.TempDir(), "s.db")
	total := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "SQLSTORE_TEST_CHILD="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acked []string
		in := bufio.NewScanner(out)
		for in.Scan() {
			acked = append(acked, in.Text())
			if len(acked) == 300+round*77 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		s := open(t, path)
		if err := s.View(t.Context(), func(tx registration.Tx) error {
			for _, id := range acked {
				if _, err := tx.Device("scope", id); err != nil {
					t.Errorf("%s was acknowledged: %v", id, err)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		total += len(acked)
	}
	if total < 1000 {
		t.Errorf("only %d acknowledgements were seen", total)
	}
}

func BenchmarkPutRegistration(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "s.db"))
	var n int64
	var mu sync.Mutex
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mu.Lock()
			n++
			id := fmt.Sprint("dev-", n)
			mu.Unlock()
			if err := s.Update(context.Background(), func(tx registration.Tx) error {
				return tx.PutRegistration("scope", &registration.Registration{ID: id, Group: "g"})
			}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
