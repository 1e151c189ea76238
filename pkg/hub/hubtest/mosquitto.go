package hubtest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/registration"
)

// The user that the service is at the broker, with the hash of its password: PBKDF2 of SHA-512.
const (
	mosquittoSecret = "correct-horse"
	mosquittoSalt   = "dG91Y2htYXJrc2Fs"
	mosquittoHash   = "DK5JVXb9IzSpWU79izhrqZzLgtIWOxid7VT4YnOhRxyKS5ofTDMuhlljZMyq0o9aJAIZ4eMEQhifQdgPUyU8iQ=="
)

// A Mosquitto is a broker with the dynamic security plugin, in a directory of the test's own. It has a port for those who have a
// password, and one for those who have a certificate.
type Mosquitto struct {
	Passwords, Certificates int // ports
	// Root is whom it trusts, and who signed its own certificate.
	Root *attesttest.Holder

	dir  string
	proc *exec.Cmd
}

// StartMosquitto starts Debian's.
func StartMosquitto(t testing.TB) *Mosquitto {
	t.Helper()
	plugins, _ := filepath.Glob("/usr/lib/*/mosquitto_dynamic_security.so")
	if mosquittoProgram() == "" || len(plugins) == 0 {
		hsmtest.Require(t, "mosquitto and its dynamic security plugin (Debian package mosquitto)")
	}
	m := &Mosquitto{dir: t.TempDir(), Passwords: freePort(t), Certificates: freePort(t)}
	m.Root = attesttest.CA(t, nil, "Broker Root", today)
	server := attesttest.Leaf(t, m.Root, "localhost", today)
	m.write(t, "root.pem", "CERTIFICATE", m.Root.Certificate.Raw)
	m.write(t, "server.pem", "CERTIFICATE", server.Certificate.Raw)
	key, err := x509.MarshalPKCS8PrivateKey(server.Key)
	if err != nil {
		t.Fatal(err)
	}
	m.write(t, "server.key", "PRIVATE KEY", key)
	// As mosquitto_ctrl dynsec init makes it, with a user of ours who may do no more than what help hubs says.
	m.file(t, "dynsec.json", `{"clients":[{"username":"dps","password":"`+mosquittoHash+`","salt":"`+mosquittoSalt+`","iterations":1,"roles":[{"rolename":"provisioning"}]},
		{"username":"admin","textname":"somebody else's"},
		{"username":"provisioner","textname":"by its certificate","roles":[{"rolename":"provisioning"}]}],
		"roles":[{"rolename":"provisioning","acls":[
		{"acltype":"publishClientSend","topic":"$CONTROL/dynamic-security/#","allow":true},
		{"acltype":"publishClientReceive","topic":"$CONTROL/dynamic-security/#","allow":true},
		{"acltype":"subscribePattern","topic":"$CONTROL/dynamic-security/#","allow":true}]}],
		"defaultACLAccess":{"publishClientSend":false,"publishClientReceive":true,"subscribe":false,"unsubscribe":true}}`)
	listener := func(port int, more string) string {
		return fmt.Sprintf("listener %d 127.0.0.1\ncafile %[2]s/root.pem\ncertfile %[2]s/server.pem\nkeyfile %[2]s/server.key\n%s\n", port, m.dir, more)
	}
	m.file(t, "mosquitto.conf", "user root\nper_listener_settings false\nallow_anonymous false\nplugin "+plugins[0]+"\nplugin_opt_config_file "+m.dir+"/dynsec.json\nlog_type all\n"+
		listener(m.Passwords, "")+listener(m.Certificates, "require_certificate true\nuse_identity_as_username true"))
	t.Cleanup(func() { m.Kill(t) })
	m.Start(t)
	return m
}

func today(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
}

func freePort(t testing.TB) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func mosquittoProgram() string {
	if p, err := exec.LookPath("mosquitto"); err == nil {
		return p
	}
	if _, err := os.Stat("/usr/sbin/mosquitto"); err == nil {
		return "/usr/sbin/mosquitto"
	}
	return ""
}

func (m *Mosquitto) file(t testing.TB, name, text string) {
	if err := os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m *Mosquitto) write(t testing.TB, name, kind string, der []byte) {
	m.file(t, name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
}

// Start starts the broker again, and waits until it listens.
func (m *Mosquitto) Start(t testing.TB) {
	t.Helper()
	m.proc = exec.Command(mosquittoProgram(), "-c", filepath.Join(m.dir, "mosquitto.conf"))
	stderr, err := m.proc.StderrPipe()
	if err == nil {
		err = m.proc.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() {
		var log strings.Builder
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(&log, lines.Text())
			if strings.HasSuffix(lines.Text(), " running") {
				ready <- ""
			}
		}
		select {
		case ready <- log.String():
		default:
		}
	}()
	if log := <-ready; log != "" {
		t.Fatalf("mosquitto does not run: %s", log)
	}
}

// Edit changes what the plugin has kept while the broker stands still.
func (m *Mosquitto) Edit(t testing.TB, edit func(string) string) {
	t.Helper()
	m.Kill(t)
	b, err := os.ReadFile(filepath.Join(m.dir, "dynsec.json"))
	if err != nil {
		t.Fatal(err)
	}
	m.file(t, "dynsec.json", edit(string(b)))
	m.Start(t)
}

// Kill kills the broker.
func (m *Mosquitto) Kill(testing.TB) {
	if m.proc != nil {
		m.proc.Process.Kill()
		m.proc.Wait()
		m.proc = nil
	}
}

// Linked is the broker as a linked hub, for a user with a password.
func (m *Mosquitto) Linked(name string) registration.LinkedHub {
	return registration.LinkedHub{Name: name, Kind: registration.HubMosquitto, ConnectionString: fmt.Sprintf("HostName=localhost;Port=%d;Username=dps;Password=%s;CA=%s",
		m.Passwords, mosquittoSecret, m.ca())}
}

// LinkedByCertificate is the broker as a linked hub, for one with a certificate.
func (m *Mosquitto) LinkedByCertificate(t testing.TB, name string) registration.LinkedHub {
	t.Helper()
	leaf := attesttest.Leaf(t, m.Root, "provisioner", today)
	key, err := x509.MarshalPKCS8PrivateKey(leaf.Key)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(kind string, der []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return registration.LinkedHub{Name: name, Kind: registration.HubMosquitto, ConnectionString: fmt.Sprintf("HostName=localhost;Port=%d;Certificate=%s;Key=%s;CA=%s",
		m.Certificates, blob("CERTIFICATE", leaf.Certificate.Raw), blob("PRIVATE KEY", key), m.ca())}
}

func (m *Mosquitto) ca() string {
	return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Root.Certificate.Raw}))
}

// Control does a command of mosquitto_ctrl dynsec, as the administrator.
func (m *Mosquitto) Control(t testing.TB, args ...string) string {
	t.Helper()
	c := exec.Command("mosquitto_ctrl", append([]string{"-h", "localhost", "-p", strconv.Itoa(m.Passwords), "--cafile", m.dir + "/root.pem", "-u", "dps", "-P", mosquittoSecret, "dynsec"}, args...)...)
	out, err := c.CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("Error:")) {
		t.Fatalf("mosquitto_ctrl %v: %v: %s", args, err, out)
	}
	return string(out)
}

// A Device is one that is connected to a broker.
type Device struct {
	net.Conn
	r    *bufio.Reader
	id   uint16
	came []*mqtt.Packet // messages, while something else was awaited
}

// ErrRefused says that a broker did not let a device connect, subscribe or publish.
var ErrRefused = errors.New("refused by the broker")

// Connect connects as a device does: with its ID and key, or the certificate of a leaf whose name is its ID.
func (m *Mosquitto) Connect(t testing.TB, id, password string, leaf *attesttest.Holder) (*Device, error) {
	t.Helper()
	return m.ConnectAs(t, id, id, password, leaf)
}

// ConnectAs connects by another client ID.
func (m *Mosquitto) ConnectAs(t testing.TB, clientID, id, password string, leaf *attesttest.Holder) (*Device, error) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(m.Root.Certificate)
	cfg := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	port := m.Passwords
	if leaf != nil {
		cfg.Certificates, port = []tls.Certificate{*leaf.TLS()}, m.Certificates
	}
	c, err := tls.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), cfg)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	d := &Device{Conn: c, r: bufio.NewReader(c)}
	var secret []byte
	if password != "" {
		secret = []byte(password)
	}
	c.Write(mqtt.AppendConnect(nil, clientID, id, secret, 60))
	p, err := d.Await(mqtt.Connack)
	if err == nil && p.ReturnCode != 0 {
		c.Close()
		err = fmt.Errorf("%w: return code %d", ErrRefused, p.ReturnCode)
	}
	return d, err
}

// Leaf is a device's certificate, which the broker trusts.
func (m *Mosquitto) Leaf(t testing.TB, id string) *attesttest.Holder {
	return attesttest.Leaf(t, m.Root, id, today)
}

// Await reads packets until one of a type comes.
func (d *Device) Await(want mqtt.Type) (*mqtt.Packet, error) {
	for {
		p, err := mqtt.Read(d.r, 1<<16)
		if err != nil || p.Type == want {
			return p, err
		}
		if p.Type == mqtt.Publish {
			d.came = append(d.came, p)
		}
	}
}

// Subscribe subscribes to a filter.
func (d *Device) Subscribe(filter string) error {
	d.id++
	d.Write(mqtt.AppendSubscribe(nil, d.id, filter, 1))
	p, err := d.Await(mqtt.Suback)
	if err == nil && p.Codes[0] > 1 {
		err = fmt.Errorf("%w: %s", ErrRefused, filter)
	}
	return err
}

// Publish publishes, and waits for the broker to have it: which in MQTT 3.1.1 says nothing of whether that was allowed.
func (d *Device) Publish(topic, payload string) error {
	d.id++
	d.Write(mqtt.AppendPublish(nil, topic, 1, d.id, []byte(payload)))
	_, err := d.Await(mqtt.Puback)
	return err
}

// Next returns the topic and payload of the next message.
func (d *Device) Next() (string, error) {
	var p *mqtt.Packet
	if len(d.came) > 0 {
		p, d.came = d.came[0], d.came[1:]
	} else {
		var err error
		if p, err = d.Await(mqtt.Publish); err != nil {
			return "", err
		}
	}
	if p.QoS == 1 {
		d.Write(mqtt.AppendPuback(nil, p.ID))
	}
	return p.Topic + " " + string(p.Payload), nil
}
