package main

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/evidence"
)

const tpmProfile = `
registration-id = "{serial|lower}"
attestation = "x509"
enrollment = "group"
group = "tpm-devices"
[key]
in = "tpm"
store = "tpm:?device=unix:{tpm}"
uri = "tpm:object=device-key?device=unix:{tpm}&keys=."
[stamp]
nv = "0x01800001"
`

const attestationProfile = `
attestation = "tpm"
enrollment = "individual"
[key]
store = "tpm:?device=unix:{tpm}"
`

// newTPMLine makes a line, and a list of devices with a software TPM each.
func newTPMLine(t *testing.T, devices int) (dir string, tpms []*hsmtest.TPM) {
	t.Helper()
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir = t.TempDir()
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233")
	if err := os.WriteFile(filepath.Join(dir, "line", "profiles", "tpm.toml"), []byte(tpmProfile), 0o644); err != nil {
		t.Fatal(err)
	}
	list := []byte("serial,tpm\n")
	for i := range devices {
		tpm := hsmtest.SWTPM(t)
		tpms = append(tpms, tpm)
		list = fmt.Appendf(list, "SN%06d,%s\n", i, tpm.Socket)
	}
	if err := os.WriteFile(filepath.Join(dir, "serials.csv"), list, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir, tpms
}

var mintTPM = []string{"mint", "--line", "line", "--profile", "tpm", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb", "--json"}

// A hundred devices, each with a TPM of its own: the keys are made there, the bundle proves it, and a proof that was taken
// from another device or changed is refused.
func TestMintTPM(t *testing.T) {
	const devices = 100
	dir, tpms := newTPMLine(t, devices)
	start := time.Now()
	var res mintResult
	if err := json.Unmarshal([]byte(touchmark(t, dir, mintTPM...)), &res); err != nil || res.Minted != devices {
		t.Fatalf("%v: %+v", err, res)
	}
	t.Logf("%d devices in %v", devices, time.Since(start).Round(time.Millisecond))
	verify := []string{"bundle", "verify", "b.tmb", "--trust", "line/station.pem", "--require-residency", "tpm", "--json"}
	if out := touchmark(t, dir, verify...); !strings.Contains(out, fmt.Sprintf(`"evidence":%d`, devices)) {
		t.Errorf("verified: %s", out)
	}
	verify[len(verify)-2] = "token"
	if code, text := attempt(t, dir, verify...); code != exitUnverified || !strings.Contains(text, `kind "tpm", and token was asked for`) {
		t.Errorf("a TPM is no token: exit code %d\n%s", code, text)
	}
	// The same job again makes the same bundle, from what the ledger keeps.
	first, err := os.ReadFile(filepath.Join(dir, "b.tmb"))
	if err != nil {
		t.Fatal(err)
	}
	touchmark(t, dir, mintTPM...)
	if again, err := os.ReadFile(filepath.Join(dir, "b.tmb")); err != nil || len(again) != len(first) {
		t.Errorf("the bundle was written again with %d octets, not %d: %v", len(again), len(first), err)
	}
	// What is in NV is locked, and other programs read it.
	for _, i := range []int{0, devices - 1} {
		want := fmt.Sprintf(`{"idScope":"0ne00112233","globalEndpoint":"global.azure-devices-provisioning.net","registrationId":"sn%06d"}`, i)
		read := exec.Command("tpm2_nvread", "-C", "0x01800001", "0x01800001")
		read.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+tpms[i].TCTI())
		if out, err := read.Output(); err != nil || string(out) != want {
			t.Errorf("tpm2_nvread of device %d: %s, %v", i, out, err)
		}
		if code, text := attempt(t, dir, "tpm", "nv", "write", "0x01800001", "--in", "serials.csv", "--tpm", "tpm:?device=unix:"+tpms[i].Socket); code == 0 {
			t.Errorf("NV of device %d was written over: %s", i, text)
		}
	}
	// What is in the stamp is the TPM's blob, and no other TPM loads it.
	blob, err := os.ReadFile(filepath.Join(dir, "stamps", "sn000000", "device-key.pem"))
	if err != nil || !bytes.Contains(blob, []byte("TSS2 PRIVATE KEY")) {
		t.Errorf("%v: %.40s", err, blob)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")

	// TPM attestation, registration IDs from the endorsement keys. Again, the bundle says the same.
	touchmark(t, dir, "init", "line-2", "--id-scope", "0ne00112233")
	if err := os.WriteFile(filepath.Join(dir, "line-2", "profiles", "tpm.toml"), []byte(attestationProfile), 0o644); err != nil {
		t.Fatal(err)
	}
	attestation := slices.Clone(mintTPM)
	attestation[2], attestation[8], attestation[10] = "line-2", "stamps-2", "b2.tmb"
	start = time.Now()
	if err := json.Unmarshal([]byte(touchmark(t, dir, attestation...)), &res); err != nil || res.Minted != devices {
		t.Fatalf("%v: %+v", err, res)
	}
	t.Logf("%d endorsement keys in %v", devices, time.Since(start).Round(time.Millisecond))
	touchmark(t, dir, "bundle", "verify", "b2.tmb", "--trust", "line-2/station.pem", "--require-residency", "tpm")
	before := bundleEntries(t, filepath.Join(dir, "b2.tmb"), filepath.Join(dir, "line-2", "station.pem"))
	touchmark(t, dir, attestation...)
	after := bundleEntries(t, filepath.Join(dir, "b2.tmb"), filepath.Join(dir, "line-2", "station.pem"))
	if !reflect.DeepEqual(before, after) || len(after) != devices {
		t.Errorf("written again the bundle has %d other entries", len(after))
	}
	for _, e := range after[:3] {
		ek, err := base64.StdEncoding.DecodeString(e.Individual.Attestation.TPM.EndorsementKey)
		if err != nil || len(ek) != 316 || residency.RegistrationID(ek) != e.Individual.RegistrationID { // DPS device API, section 9.1
			t.Errorf("%s: endorsement key of %d octets, %v", e.Individual.RegistrationID, len(ek), err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "stamps-2", e.Individual.RegistrationID, "provisioning.json"))
		if err != nil || !bytes.Contains(b, []byte(`"attestation":"tpm"`)) {
			t.Errorf("stamp: %s, %v", b, err)
		}
		other := after[4]
		other.Evidence = e.Evidence
		if err := other.Resides(evidence.TPM); !errors.Is(err, evidence.ErrResidency) {
			t.Errorf("another TPM's proof: %v", err)
		}
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line-2")

	// Proofs that were taken from another device, or changed, are refused, whoever signed the bundle.
	entries := bundleEntries(t, filepath.Join(dir, "b.tmb"), filepath.Join(dir, "line", "station.pem"))
	a, b := entries[0], entries[1]
	for what, forge := range map[string]func() bundle.Entry{
		"another device's": func() bundle.Entry { e := a; e.Evidence = b.Evidence; return e },
		"another registration ID": func() bundle.Entry {
			e, d := a, *a.Device
			d.RegistrationID = "somebody"
			e.Device = &d
			return e
		},
		"another key": func() bundle.Entry {
			e, d := a, *a.Device
			d.KeyHash = b.Device.KeyHash
			e.Device = &d
			return e
		},
		"one octet": func() bundle.Entry {
			e, ev, proof := a, *a.Evidence, *a.Evidence.TPM
			proof.Answer.Attest = bytes.Clone(proof.Answer.Attest)
			proof.Answer.Attest[len(proof.Answer.Attest)/2] ^= 1
			ev.TPM, e.Evidence = &proof, &ev
			return e
		},
		"none": func() bundle.Entry { e := a; e.Evidence = nil; return e },
	} {
		e := forge()
		if err := e.Resides(evidence.TPM); !errors.Is(err, evidence.ErrResidency) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := a.Resides(evidence.TPM); err != nil {
		t.Error(err)
	}

	// One TPM is one device.
	if err := os.WriteFile(filepath.Join(dir, "again.csv"), fmt.Appendf(nil, "serial,tpm\nOTHER,%s\n", tpms[7].Socket), 0o644); err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(mintTPM)
	args[6], args[10] = "again.csv", "again.tmb"
	if code, text := attempt(t, dir, args...); code != exitFailed || !strings.Contains(text, "endorsement key") || !strings.Contains(text, "SN000007") {
		t.Errorf("a second device with one TPM: exit code %d\n%s", code, text)
	}
}

// bundleEntries returns the devices of a bundle.
func bundleEntries(t *testing.T, path, station string) []bundle.Entry {
	t.Helper()
	pub, err := readPublicKey(station)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := bundle.Open(f, bundle.OpenConfig{Trusted: []crypto.PublicKey{pub}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []bundle.Entry
	for e, err := range r.Entries() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Group == nil {
			all = append(all, e)
		}
	}
	return all
}

// The plug of TPMs is pulled in the middle of a batch: they are killed and started again. One mint goes on through it, or
// another one takes the job up, and each device ends with one key.
func TestTPMDies(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	const devices = 30
	dir, tpms := newTPMLine(t, devices)
	cmd := exec.Command(program(t), mintTPM...)
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	kills := 0
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		default:
			tpm := tpms[kills%devices]
			tpm.Kill()
			time.Sleep(10 * time.Millisecond)
			tpm.Start()
			kills++
		}
	}
	t.Logf("%d kills", kills)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	var res mintResult
	if err := json.Unmarshal(stdout.Bytes(), &res); err != nil || res.Minted != devices {
		t.Errorf("%v: %s", err, stdout.String())
	}
	touchmark(t, dir, "bundle", "verify", "b.tmb", "--trust", "line/station.pem", "--require-residency", "tpm")
	touchmark(t, dir, "ledger", "verify", "--line", "line")
}
