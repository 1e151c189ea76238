package tpm_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/tcp"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

// front stands before a real TPM and passes commands on, in the protocol of Microsoft's simulator or bare; answer may answer in
// its place.
type front struct {
	t      *testing.T
	s      *hsmtest.TPM
	sim    bool
	answer func(command []byte) (response []byte, hangUp bool)
	seen   atomic.Int64

	mu sync.Mutex // the TPM takes one caller
}

// listen listens on a port, and with the simulator's protocol also on the next.
func (f *front) listen() string {
	f.t.Helper()
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			f.t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		if f.sim {
			p, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1))
			if err != nil {
				_ = l.Close()
				continue
			}
			f.serve(p, f.platform)
		}
		f.serve(l, f.commands)
		return l.Addr().String()
	}
	f.t.Fatal("no two ports in a row")
	return ""
}

func (f *front) serve(l net.Listener, handle func(net.Conn) error) {
	var wg sync.WaitGroup
	f.t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				for handle(c) == nil {
				}
			})
		}
	})
}

func (f *front) platform(c net.Conn) error {
	var signal uint32
	if err := binary.Read(c, binary.BigEndian, &signal); err != nil {
		return err
	}
	if signal == 20 {
		return io.EOF
	}
	return binary.Write(c, binary.BigEndian, uint32(0))
}

func (f *front) commands(c net.Conn) error {
	var command []byte
	if f.sim {
		var header struct {
			Code     uint32
			Locality uint8
			Size     uint32
		}
		if err := binary.Read(c, binary.BigEndian, &header.Code); err != nil || header.Code != 8 {
			return io.EOF
		}
		if err := binary.Read(c, binary.BigEndian, &header.Locality); err != nil {
			return err
		}
		if err := binary.Read(c, binary.BigEndian, &header.Size); err != nil {
			return err
		}
		command = make([]byte, header.Size)
		if _, err := io.ReadFull(c, command); err != nil {
			return err
		}
	} else {
		header := make([]byte, 10)
		if _, err := io.ReadFull(c, header); err != nil {
			return err
		}
		command = make([]byte, binary.BigEndian.Uint32(header[2:]))
		copy(command, header)
		if _, err := io.ReadFull(c, command[10:]); err != nil {
			return err
		}
	}
	f.seen.Add(1)
	response, hangUp := f.pass(command)
	if hangUp {
		return io.EOF
	}
	if !f.sim {
		_, err := c.Write(response)
		return err
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(response)))
	_, err := c.Write(binary.BigEndian.AppendUint32(append(b, response...), 0))
	return err
}

func (f *front) pass(command []byte) (response []byte, hangUp bool) {
	if f.answer != nil {
		if response, hangUp = f.answer(command); response != nil || hangUp {
			return response, hangUp
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := net.Dial("unix", f.s.Socket)
	if err != nil {
		return nil, true
	}
	defer c.Close()
	if _, err := c.Write(command); err != nil {
		return nil, true
	}
	header := make([]byte, 10)
	if _, err := io.ReadFull(c, header); err != nil {
		return nil, true
	}
	response = make([]byte, binary.BigEndian.Uint32(header[2:]))
	copy(response, header)
	_, err = io.ReadFull(c, response[10:])
	return response, err != nil
}

// code is a response that is a code and nothing else.
func code(rc tpm2.TPMRC) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0x80, 0x01}, 10)
	return binary.BigEndian.AppendUint32(b, uint32(rc))
}

func TestTCP(t *testing.T) {
	_, port := hsmtest.SWTPMTCP(t)
	uri := hsm.URI{Scheme: hsm.SchemeTPM, Device: fmt.Sprintf("tcp:127.0.0.1:%d", port), Keys: t.TempDir()}
	store := open(t, uri) // which starts the TPM: nobody else does
	hsmtest.Check(t, signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))
}

// The simulator's protocol: go-tpm's own client shows that what stands before the TPM speaks it, then we do.
func TestSimulatorProtocol(t *testing.T) {
	s := hsmtest.SWTPM(t)
	f := &front{t: t, s: s, sim: true}
	address := f.listen()
	host, port, _ := net.SplitHostPort(address)
	var n int
	if _, err := fmt.Sscan(port, &n); err != nil {
		t.Fatal(err)
	}
	theirs, err := tcp.Open(tcp.Config{CommandAddress: address, PlatformAddress: net.JoinHostPort(host, fmt.Sprint(n+1))})
	if err != nil {
		t.Fatal(err)
	}
	if err := theirs.PowerOn(); err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.GetRandom{BytesRequested: 8}).Execute(theirs); err != nil {
		t.Fatal(err)
	}
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	store := open(t, hsm.URI{Scheme: hsm.SchemeTPM, Device: "mssim:" + address, Keys: t.TempDir()})
	hsmtest.Check(t, signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// A TPM that is busy is asked again; one that stays busy, or hangs up, is not asked for ever.
func TestBusy(t *testing.T) {
	s := hsmtest.SWTPM(t)
	busy := []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate}
	var n atomic.Int64
	f := &front{t: t, s: s, answer: func([]byte) ([]byte, bool) {
		if i := n.Add(1); i%3 != 0 {
			return code(busy[int(i)%len(busy)]), false
		}
		return nil, false
	}}
	store := open(t, hsm.URI{Scheme: hsm.SchemeTPM, Device: "tcp:" + f.listen(), Keys: t.TempDir()})
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	hsmtest.Check(t, key)
	if f.seen.Load() < 12 {
		t.Error("the TPM was never busy")
	}
}

// A connection that breaks before a command and one that breaks after it, at every command of an operation: the operation
// ends well, and nothing stays behind in the TPM.
func TestBrokenConnection(t *testing.T) {
	s := hsmtest.SWTPM(t)
	for _, after := range []bool{false, true} {
		for at := range int64(24) {
			var n atomic.Int64
			f := &front{t: t, s: s}
			f.answer = func(command []byte) ([]byte, bool) {
				if n.Add(1) != at+1 {
					return nil, false
				}
				if after { // it is done, and the answer is lost
					c, err := net.Dial("unix", s.Socket)
					if err == nil {
						_, _ = c.Write(command)
						_, _ = c.Read(make([]byte, 4096))
						_ = c.Close()
					}
				}
				return nil, true
			}
			address := f.listen()
			n.Store(-1 << 30) // not while it is opened: a TPM that never answered is not there
			store, err := tpm.Open(t.Context(), tpm.Config{URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "tcp:" + address, Keys: t.TempDir()}, PIN: secret("auth"), Protect: true})
			if err != nil {
				t.Fatal(err)
			}
			n.Store(0)
			key, err := store.Generate(t.Context(), hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
			if err != nil {
				t.Fatalf("broken at command %d: %v", at, err)
			}
			hsmtest.Check(t, key.(hsm.SigningKey))
			if err := store.Close(); err != nil {
				t.Errorf("broken at command %d, in Close: %v", at, err)
			}
			clean(t, s)
		}
	}
}

// An operation that nobody waits for any more, ended at every command, leaves nothing behind.
func TestCancelled(t *testing.T) {
	s := hsmtest.SWTPM(t)
	tool(t, s, nil, "tpm2_changeauth", "-c", "endorsement", "3ndorsement")
	f := &front{t: t, s: s}
	var n atomic.Int64
	var cancel context.CancelFunc
	f.answer = func([]byte) ([]byte, bool) {
		if n.Add(-1) == 0 {
			cancel()
		}
		return nil, false
	}
	store, err := tpm.Open(t.Context(), tpm.Config{
		URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "tcp:" + f.listen(), Keys: t.TempDir()}, PIN: secret("auth"), Protect: true, Endorsement: hsm.Secret("3ndorsement"),
	})
	if err != nil {
		t.Fatal(err)
	}
	generate(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	generate(t, store, hsm.Spec{Name: "mac", Algorithm: hsm.HMACSHA256})
	e := ek(t, store, tpm.EKECC)
	ended := 0
	for at := range int64(60) {
		ctx, stop := context.WithCancel(t.Context())
		cancel = stop
		n.Store(at + 1)
		_, err := store.Attest(ctx, e, "k", deviceID)
		if err == nil {
			var k hsm.Key
			if k, err = store.Open(ctx, "mac"); err == nil {
				_, err = k.(hsm.MACKey).MAC(ctx, nil, make([]byte, 3000))
			}
		}
		if err != nil {
			ended++
			if !is(err, context.Canceled) {
				t.Errorf("cancelled at command %d: %v", at, err)
			}
		}
		stop()
	}
	if ended < 10 {
		t.Errorf("%d operations were cancelled", ended)
	}
	n.Store(0)
	if _, err := store.Attest(t.Context(), e, "k", deviceID); err != nil {
		t.Errorf("after all that: %v", err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// What answers and is no TPM is refused.
func TestNoTPM(t *testing.T) {
	for name, bytes := range map[string]string{
		"text": "HTTP/1.1 400 Bad Request\r\n\r\n", "short": "\x80\x01\x00\x00\x00\x05\x00\x00\x00\x00", "huge": "\x80\x01\xff\xff\xff\xff\x00\x00\x00\x00", "nothing": "",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, bytes)
				_ = c.Close()
			}
		}()
		begin := time.Now()
		if _, err := tpm.Open(t.Context(), tpm.Config{URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "tcp:" + l.Addr().String()}}); err == nil || time.Since(begin) > 5*time.Second {
			t.Errorf("%s: %v", name, err)
		}
		_ = l.Close()
		<-done
	}
	if _, err := tpm.Open(t.Context(), tpm.Config{URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "/dev/null"}}); err == nil || !strings.Contains(err.Error(), "/dev/null") {
		t.Errorf("/dev/null: %v", err)
	}
}

// Answers that are wrong: the session notices, and the store is whole afterwards.
func TestTamperedAnswer(t *testing.T) {
	s := hsmtest.SWTPM(t)
	f := &front{t: t, s: s}
	var on atomic.Bool
	f.answer = func(command []byte) ([]byte, bool) {
		if !on.Load() || tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) != tpm2.TPMCCSign {
			return nil, false
		}
		on.Store(false)
		quiet := &front{t: t, s: s}
		response, _ := quiet.pass(command)
		response[30] ^= 1
		return response, false
	}
	store, err := tpm.Open(t.Context(), tpm.Config{URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "tcp:" + f.listen(), Keys: t.TempDir()}, PIN: secret("auth"), Protect: true})
	if err != nil {
		t.Fatal(err)
	}
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	on.Store(true)
	if _, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("a changed answer passes for a signature")
	}
	hsmtest.Check(t, key)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}
