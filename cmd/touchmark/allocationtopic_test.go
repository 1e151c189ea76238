package main

import (
	"bufio"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/hub"
)

// block returns an indented block of a page, from a line that begins with these words on.
func block(t *testing.T, page, begin string) string {
	t.Helper()
	_, text, ok := strings.Cut(page, "\n    "+begin)
	text, _, end := strings.Cut(begin+text, "\n\n")
	if !ok || !end {
		t.Fatalf("the page has no block %q", begin)
	}
	return strings.ReplaceAll(text, "\n    ", "\n")
}

// The examples of help allocation work as they stand there.
func TestAllocationPage(t *testing.T) {
	table, err := allocation.Parse("page.toml", []byte(block(t, allocationTopic.Long, "[networks]")))
	if err != nil {
		t.Fatal(err)
	}
	hubs := []allocation.Hub{{Name: "e", Location: "eastus"}, {Name: "w", Location: "westeurope"}}
	if got := table.Nearest(netip.MustParseAddr("10.8.3.4"), hubs); len(got) != 1 || got[0].Name != "w" {
		t.Errorf("%v", got)
	}
	if _, err := exec.LookPath("python3"); err != nil {
		hsmtest.Require(t, "python3")
	}
	cmd := exec.Command("python3", "-u", "-c", block(t, allocationTopic.Long, "import http.server")+`
server = http.server.HTTPServer(("127.0.0.1", 0), Allocate)
print(server.server_port)
server.serve_forever()`)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	var port int
	if _, err := fmt.Fscan(bufio.NewReader(out), &port); err != nil {
		t.Fatal(err)
	}
	w := hub.NewWebhook(hub.WebhookConfig{LoopbackHTTP: true})
	answer, status, err := w.Call(t.Context(), fmt.Sprintf("http://127.0.0.1:%d/?code=x", port),
		[]byte(`{"deviceRuntimeContext":{"registrationId":"d","payload":{"model":"x1"}},"linkedHubs":["hub-a.example.net","x1-hub.example.net"]}`))
	if err != nil || status != 200 || string(answer) != `{"iotHubHostName": "x1-hub.example.net", "payload": {"model": "x1"}}` {
		t.Errorf("%s, %d, %v", answer, status, err)
	}
}

// A latency table that is none, and a device that is not to wait at all, are refused at the start.
func TestProvisionFlags(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "bad.toml"), "[networks]\n\"10.0.0.1/8\" = \"x\"\n")
	for want, args := range map[string][]string{
		"bad.toml, line 1:":    {"--latency-table", "bad.toml"},
		"none.toml":            {"--latency-table", "none.toml"},
		"--hub-give-up 10ms":   {"--hub-give-up", "10ms"},
		"--webhook-retries 4:": {"--webhook-retries", "4"},
		"--webhook-secret-file: bad.toml holds no base64": {"--webhook-secret-file", "bad.toml"},
		"--webhook-ca: bad.toml holds no certificate":     {"--webhook-ca", "bad.toml"},
	} {
		if code, text := attempt(t, dir, append([]string{"serve", "--data", "svc"}, args...)...); code != exitUsage || !strings.Contains(text, want) {
			t.Errorf("%v: exit code %d\n%s", args, code, text)
		}
	}
}
