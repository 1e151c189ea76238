package hsmtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
)

// The signals of Microsoft's reference simulator that its clients send (TpmTcpProtocol.h). A client ends with 20 or 21.
const (
	simSendCommand = 8
	simHandshake   = 15
	simSessionEnd  = 20
)

// Simulator stands before the software TPM until the test ends, and speaks the protocol of Microsoft's reference simulator: commands
// on the port that it returns, power on the next. It passes every command on to the TPM and every response back, as they are; what
// it answers itself is the protocol around them. Vendors' libraries, TSS.js among them, reach a TPM in no other way over TCP.
func (s *TPM) Simulator(t testing.TB) int {
	t.Helper()
	var turn sync.Mutex // the TPM takes one caller
	pass := func(command []byte) ([]byte, error) {
		turn.Lock()
		defer turn.Unlock()
		c, err := net.Dial("unix", s.Socket)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		if _, err := c.Write(command); err != nil {
			return nil, err
		}
		response := make([]byte, 10)
		if _, err := io.ReadFull(c, response); err != nil {
			return nil, err
		}
		rest := binary.BigEndian.Uint32(response[2:])
		if rest < 10 || rest > 4096 {
			return nil, fmt.Errorf("a response of %d octets", rest)
		}
		response = append(response, make([]byte, rest-10)...)
		_, err = io.ReadFull(c, response[10:])
		return response, err
	}
	commands := func(c net.Conn) error {
		var signal uint32
		if err := binary.Read(c, binary.BigEndian, &signal); err != nil {
			return err
		}
		switch signal {
		case simHandshake:
			var version uint32
			if err := binary.Read(c, binary.BigEndian, &version); err != nil {
				return err
			}
			return binary.Write(c, binary.BigEndian, []uint32{1, 0, 0}) // version, what it is, done
		case simSendCommand:
			var head struct {
				Locality uint8
				Size     uint32
			}
			if err := binary.Read(c, binary.BigEndian, &head); err != nil {
				return err
			}
			if head.Size > 4096 {
				return fmt.Errorf("a command of %d octets", head.Size)
			}
			command := make([]byte, head.Size)
			if _, err := io.ReadFull(c, command); err != nil {
				return err
			}
			response, err := pass(command)
			if err != nil {
				return err
			}
			b := append(binary.BigEndian.AppendUint32(nil, uint32(len(response))), response...)
			_, err = c.Write(binary.BigEndian.AppendUint32(b, 0))
			return err
		}
		return io.EOF
	}
	platform := func(c net.Conn) error {
		var signal uint32
		if err := binary.Read(c, binary.BigEndian, &signal); err != nil {
			return err
		}
		if signal >= simSessionEnd {
			return io.EOF
		}
		return binary.Write(c, binary.BigEndian, uint32(0)) // it is on
	}
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		p, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1))
		if err != nil {
			_ = l.Close()
			continue
		}
		answer(t, l, commands)
		answer(t, p, platform)
		return port
	}
	t.Fatal("no two ports in a row")
	return 0
}

// answer serves each caller of a listener, one signal after another, until the test ends.
func answer(t testing.TB, l net.Listener, signal func(net.Conn) error) {
	var mu sync.Mutex
	open := make(map[net.Conn]bool)
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				for err = nil; err == nil; {
					err = signal(c)
				}
				if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					t.Errorf("the TPM's simulator protocol: %v", err)
				}
				_ = c.Close()
			})
		}
	})
}
