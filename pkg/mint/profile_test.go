package mint

import (
	"strings"
	"testing"
)

// A key.store that is the same for every device is one TPM for all of them, and said so.
func TestProfileSameTPM(t *testing.T) {
	for _, text := range []string{
		"attestation = \"tpm\"\nenrollment = \"individual\"\n[key]\nstore = \"tpm:?device=/dev/tpm0\"\n",
		"registration-id = \"{serial}\"\nattestation = \"x509\"\nenrollment = \"individual\"\n[key]\nin = \"tpm\"\nstore = \"tpm:?device=/dev/tpm0\"\n",
	} {
		if _, err := LoadProfile("tpm", strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), "names the same TPM for every device") {
			t.Errorf("%v", err)
		}
	}
}
