package amqpd_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A WebSocket's ping is answered however long the door has said nothing.
func TestSocketPing(t *testing.T) {
	const second = 20 * time.Millisecond
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	d := &service{Fixture: f, Listener: f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		handle := amqpd.New(amqpd.Config{Registrar: f.Service, Now: f.Now, ResponseDelay: -1, Second: second}).Handle
		return httpd.New(httpd.Config{Registrar: f.Service, Now: f.Now, Door: door.New(door.Config{TLS: door.TLSConfig(cert, "http/1.1")}),
			Sockets: map[string]door.Handler{"amqpwsb10": handle}}).Serve(ctx, l)
	})}
	below := d.Dial(t, f.Own.TLS())
	ws, _, err := websocket.Dial(t.Context(), "https://"+registrationtest.Host+"/", &websocket.DialOptions{Subprotocols: []string{"amqpwsb10"},
		HTTPClient: &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return below, nil }}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ws.CloseNow() })
	nc := websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	r := bufio.NewReader(nc)
	if _, err := nc.Write(append(amqp.AppendHeader(nil, amqp.AMQP), frames(opening)...)); err != nil {
		t.Fatal(err)
	}
	if _, err := amqp.ReadHeader(r); err != nil {
		t.Fatal(err)
	}
	if f, err := amqp.ReadFrame(r, 1000); err != nil {
		t.Fatal(f, err)
	}
	<-time.After(15 * second) // longer than a write may take
	answered := make(chan error, 1)
	go func() {
		_, err := amqp.ReadFrame(r, 1000) // takes the pong as well
		answered <- err
	}()
	if err := ws.Ping(t.Context()); err != nil {
		t.Fatalf("ping: %v", err)
	}
	if _, err := nc.Write(frames(&amqp.Close{})); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
}
