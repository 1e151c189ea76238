package sqlstore_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

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

// A store in memory keeps the same contract, each its own.
func TestMemory(t *testing.T) {
	registrationtest.Run(t, func(t *testing.T) registration.Store { return open(t, "") })
}

// Readers and writers of a store in memory work on one state, see all that was acknowledged to them and no half of a
// transaction, and wait for each other without an error. Two stores share nothing.
func TestMemoryConcurrency(t *testing.T) {
	s, other := open(t, ""), open(t, "")
	const writers, readers, rounds = 8, 8, 60
	var eg errgroup.Group
	for w := range writers {
		eg.Go(func() error {
			for i := range rounds {
				id := fmt.Sprintf("dev-%d-%d", w, i)
				if err := s.Update(t.Context(), func(tx registration.Tx) error {
					return errors.Join(tx.PutDevice("scope", &registration.Device{ID: id}), tx.PutDevice("scope", &registration.Device{ID: id + "-twin"}))
				}); err != nil {
					return err
				}
				if err := s.View(t.Context(), func(tx registration.Tx) error {
					_, err := tx.Device("scope", id)
					return err
				}); err != nil {
					return fmt.Errorf("%s was acknowledged: %w", id, err)
				}
			}
			return nil
		})
	}
	for range readers {
		eg.Go(func() error {
			for i := range rounds {
				for w := range writers {
					id := fmt.Sprintf("dev-%d-%d", w, i)
					if err := s.View(t.Context(), func(tx registration.Tx) error {
						_, one := tx.Device("scope", id)
						_, twin := tx.Device("scope", id+"-twin")
						if errors.Is(one, registration.ErrNotFound) && errors.Is(twin, registration.ErrNotFound) {
							return nil
						}
						return errors.Join(one, twin)
					}); err != nil {
						return fmt.Errorf("half of %s: %w", id, err)
					}
				}
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := other.View(t.Context(), func(tx registration.Tx) error {
		_, err := tx.Device("scope", "dev-0-0")
		return err
	}); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("another store has it: %v", err)
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
