package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
)

// amqpOpening is what a device with a certificate says before its first request, as early as it may: both links, and credit.
func amqpOpening(id string) []byte {
	address := benchScope + "/registrations/" + id
	version := amqp.Map{{Key: amqp.Symbol("com.microsoft:api-version"), Value: "2019-03-31"}}
	zero, one, credit := uint32(0), uint32(1), uint32(10)
	out := amqp.AppendHeader(nil, amqp.AMQP)
	for _, p := range []amqp.Performative{
		&amqp.Open{ContainerID: id, Hostname: "localhost", MaxFrameSize: 65536}, &amqp.Begin{IncomingWindow: 2048, OutgoingWindow: 2048, HandleMax: 1},
		&amqp.Attach{Name: "in", Role: amqp.Receiver, SndSettleMode: amqp.SendMixed, Source: &amqp.Source{Address: address}, Target: &amqp.Target{}, Properties: version},
		&amqp.Attach{Name: "out", Handle: one, SndSettleMode: amqp.SendMixed, Source: &amqp.Source{}, Target: &amqp.Target{Address: address}, InitialDeliveryCount: &zero, Properties: version},
		&amqp.Flow{NextIncomingID: &zero, IncomingWindow: 2048, OutgoingWindow: 2048, Handle: &zero, DeliveryCount: &zero, LinkCredit: &credit},
	} {
		out = amqp.AppendFrame(out, 0, p, nil)
	}
	return out
}

// amqpUntil reads up to a frame of a kind.
func amqpUntil[T amqp.Performative](r *bufio.Reader) amqp.Frame {
	for {
		f := must(amqp.ReadFrame(r, 1<<16))
		switch b := f.Body.(type) {
		case T:
			return f
		case *amqp.Close, *amqp.Detach, *amqp.End:
			check(fmt.Errorf("the door said %T: %+v", b, b))
		}
	}
}

// amqpExchange is the conversation of device API, section 12, in three round trips: a device may not ask before it has been
// given credit.
func amqpExchange(c *tls.Conn, id, _ string) {
	r := bufio.NewReader(c)
	must(c.Write(amqpOpening(id)))
	must(amqp.ReadHeader(r))
	amqpUntil[*amqp.Flow](r)
	var st dps.OperationStatus
	ask := func(delivery uint32, m *amqp.Message) {
		must(c.Write(amqp.AppendFrame(nil, 0, &amqp.Transfer{Handle: 1, DeliveryID: &delivery, DeliveryTag: []byte{byte(delivery)}}, amqp.AppendMessage(nil, m))))
		check(json.Unmarshal(must(amqp.DecodeMessage(amqpUntil[*amqp.Transfer](r).Payload)).Data, &st))
	}
	ask(0, &amqp.Message{ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-register"}}, Data: []byte(`{"registrationId":"` + id + `"}`)})
	ask(1, &amqp.Message{ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-get-operationstatus"}, {Key: "iotdps-operation-id", Value: st.OperationID}}})
	if st.Status != dps.Assigned {
		check(fmt.Errorf("%s is %s", id, st.Status))
	}
}

const idleChild = "idle-child"

// idle: devices that have said who they are and wait for their time, in a process of their own; reported is the memory of the
// service's process for each. There is no bare limit to it: "limit" is what it may take.
func (b *bench) idle(protocol string, limit float64) {
	n := 1000 * b.scale
	raiseFiles(n + 100)
	dir := tempDir()
	a := newAuthority()
	store, svc := newService(dir)
	defer store.Close()
	server, device := a.issue("localhost", x509.ExtKeyUsageServerAuth), a.issue("dev-1", x509.ExtKeyUsageClientAuth)
	var text []byte
	for _, block := range []pem.Block{{Type: "CERTIFICATE", Bytes: device.Certificate[0]}, {Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(device.PrivateKey))}} {
		text = append(text, pem.EncodeToMemory(&block)...)
	}
	check(os.WriteFile(filepath.Join(dir, "device.pem"), text, 0o600))
	handle := mqttd.New(mqttd.Config{Registrar: svc}).Handle
	if protocol == "amqp" {
		handle = amqpd.New(amqpd.Config{Registrar: svc}).Handle
	}
	ctx, stop := context.WithCancel(context.Background())
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	var served sync.WaitGroup
	defer served.Wait()
	defer stop()
	served.Go(func() {
		certificate := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &server, nil }
		check(door.New(door.Config{TLS: door.TLSConfig(certificate), MaxConnections: n + 10, MaxPerAddress: n + 10}).Serve(ctx, l, handle))
	})
	before := residentKiB()
	cmd := exec.Command(must(os.Executable()), idleChild, protocol, l.Addr().String(), strconv.Itoa(n), filepath.Join(dir, "device.pem"))
	cmd.Stderr = os.Stderr
	in, out := must(cmd.StdinPipe()), must(cmd.StdoutPipe())
	check(cmd.Start())
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		check(errors.Join(err, cmd.Wait()))
	}
	each := (residentKiB() - before) * 1.024 / float64(n)
	check(in.Close())
	check(cmd.Wait())
	b.report(result{"idle-" + protocol, each, limit, each / limit, "kB"})
}

// runIdleChild connects devices, says so, and holds them until its input ends.
func runIdleChild(protocol, address, count, file string) error {
	n := must(strconv.Atoi(count))
	raiseFiles(n + 100)
	cert := must(tls.LoadX509KeyPair(file, file))
	conns := make([]*tls.Conn, n)
	clients(n, func(i int) {
		// The server's certificate is not looked at: that is work, and none of the server's.
		c := must(tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}))
		r := bufio.NewReader(c)
		if protocol == "amqp" {
			must(c.Write(amqpOpening("dev-1")))
			must(amqp.ReadHeader(r))
			amqpUntil[*amqp.Flow](r)
		} else {
			out := mqtt.AppendConnect(nil, "dev-1", benchScope+"/registrations/dev-1/api-version=2019-03-31", nil, 0)
			must(c.Write(mqtt.AppendSubscribe(out, 1, "$dps/registrations/res/#", 1)))
			for p := must(mqtt.Read(r, 1<<16)); p.Type != mqtt.Suback; p = must(mqtt.Read(r, 1<<16)) {
			}
		}
		conns[i] = c
	})
	fmt.Println("connected")
	_, err := io.Copy(io.Discard, os.Stdin)
	for _, c := range conns {
		_ = c.Close()
	}
	return err
}

// raiseFiles sees to it that so many files may be open.
func raiseFiles(n int) {
	var r syscall.Rlimit
	check(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r))
	if r.Cur < uint64(n) {
		r.Cur, r.Max = uint64(n), max(r.Max, uint64(n))
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
			check(fmt.Errorf("opening %d files: %w", n, err))
		}
	}
}

// residentKiB returns the memory that this process has, once what it does not need is given back.
func residentKiB() float64 {
	debug.FreeOSMemory()
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/status")))) {
		if kib, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return float64(must(strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kib), "kB")))))
		}
	}
	panic("no VmRSS in /proc/self/status")
}
