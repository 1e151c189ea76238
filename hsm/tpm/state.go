package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// A State is what a TPM says of itself.
type State struct {
	// Device is the TPM's address.
	Device string `json:"device"`
	// Manufacturer and Vendor are texts of the manufacturer's, Firmware two numbers that it counts its firmware by.
	Manufacturer string `json:"manufacturer"`
	Vendor       string `json:"vendor"`
	Firmware     string `json:"firmware"`
	// Revision is the specification's, 1.59 for instance.
	Revision string  `json:"revision"`
	Lockout  Lockout `json:"lockout"`
	// OwnerAuth, EndorsementAuth and LockoutAuth: the hierarchy has an authorization value.
	OwnerAuth       bool `json:"ownerAuth"`
	EndorsementAuth bool `json:"endorsementAuth"`
	LockoutAuth     bool `json:"lockoutAuth"`
	// StorageEnabled and EndorsementEnabled: the hierarchy can be used since the last start.
	StorageEnabled     bool `json:"storageEnabled"`
	EndorsementEnabled bool `json:"endorsementEnabled"`
	// ClearDisabled: the TPM cannot be cleared by its lockout authorization.
	ClearDisabled bool `json:"clearDisabled"`
	// Slots is how many transient objects have room, Loaded the handles of those that are there and not this process's, without
	// a resource manager other programs' or what a killed one left.
	Slots  int      `json:"slots"`
	Loaded []uint32 `json:"loaded"`
	// Sessions is how many sessions are loaded or saved, this process's not counted.
	Sessions int `json:"sessions"`
	// Persistent are the persistent handles, PersistentFree how many more there is room for, as the TPM estimates.
	Persistent     []uint32 `json:"persistent"`
	PersistentFree uint32   `json:"persistentFree"`
	// NV are the NV indices.
	NV []NVIndex `json:"nv"`
	// Algorithms are those of package hsm that the TPM has.
	Algorithms []hsm.Algorithm `json:"algorithms"`
}

// Lockout is the TPM's protection against guessing (TPM 2.0 Part 1, 19.8). Keys that this package makes do not count
// towards it; hierarchies and other programs' keys may.
type Lockout struct {
	// Locked: authorizations are refused now.
	Locked bool `json:"locked"`
	// Failures counts wrong authorization values, MaxFailures is when the TPM locks.
	Failures    uint32 `json:"failures"`
	MaxFailures uint32 `json:"maxFailures"`
	// Recovery is after how many seconds one failure is forgiven, 0 never; LockoutRecovery after how many the lockout
	// authorization may be tried again once it was wrong, 0 after a restart.
	Recovery        uint32 `json:"recoverySeconds"`
	LockoutRecovery uint32 `json:"lockoutRecoverySeconds"`
}

// State reads the TPM's state (TPM2_GetCapability: Part 3, 30.2). It changes nothing.
func (s *Store) State(ctx context.Context) (*State, error) {
	st := &State{Device: s.dev.address}
	err := s.do(ctx, "reading the TPM's state", func(b *bus) error {
		if err := b.closeSession(); err != nil {
			return err
		}
		fixed, err := b.tpmProperties(tpm2.TPMPTFamilyIndicator, 64)
		if err != nil {
			return err
		}
		vars, err := b.tpmProperties(tpm2.TPMPTPermanent, 64)
		if err != nil {
			return err
		}
		st.Manufacturer = propertyText(fixed[tpm2.TPMPTManufacturer])
		st.Vendor = propertyText(fixed[tpm2.TPMPTVendorString1], fixed[tpm2.TPMPTVendorString2], fixed[tpm2.TPMPTVendorString3], fixed[tpm2.TPMPTVendorString4])
		f1, f2 := fixed[tpm2.TPMPTFirmwareVersion1], fixed[tpm2.TPMPTFirmwareVersion2]
		st.Firmware = fmt.Sprintf("%d.%d.%d.%d", f1>>16, f1&0xffff, f2>>16, f2&0xffff)
		st.Revision = fmt.Sprintf("%d.%02d", fixed[tpm2.TPMPTRevision]/100, fixed[tpm2.TPMPTRevision]%100)
		permanent, startup := vars[tpm2.TPMPTPermanent], vars[tpm2.TPMPTStartupClear] // TPMA_PERMANENT, TPMA_STARTUP_CLEAR: Part 2, 8.6 and 8.7
		st.OwnerAuth, st.EndorsementAuth, st.LockoutAuth = permanent&1 != 0, permanent&2 != 0, permanent&4 != 0
		st.ClearDisabled = permanent&(1<<8) != 0
		st.StorageEnabled, st.EndorsementEnabled = startup&2 != 0, startup&4 != 0
		st.Lockout = Lockout{
			Locked: permanent&(1<<9) != 0, Failures: vars[tpm2.TPMPTLockoutCounter], MaxFailures: vars[tpm2.TPMPTMaxAuthFail],
			Recovery: vars[tpm2.TPMPTLockoutInterval], LockoutRecovery: vars[tpm2.TPMPTLockoutRecovery],
		}
		st.Slots, st.PersistentFree = b.d.slots, vars[tpm2.TPMPTHRPersistentAvail]
		st.Loaded, st.Persistent, st.NV, st.Sessions = nil, nil, nil, 0
		transient, err := b.handles(0x80000000)
		if err != nil {
			return err
		}
		for _, h := range transient {
			if !b.isLoaded(h) {
				st.Loaded = append(st.Loaded, uint32(h))
			}
		}
		for _, first := range []tpm2.TPMHandle{loadedSessions, savedSessions} {
			sessions, err := b.handles(first)
			if err != nil {
				return err
			}
			st.Sessions += len(sessions)
		}
		persistent, err := b.handles(0x81000000)
		if err != nil {
			return err
		}
		for _, h := range persistent {
			st.Persistent = append(st.Persistent, uint32(h))
		}
		indices, err := b.handles(0x01000000)
		if err != nil {
			return err
		}
		for _, h := range indices {
			n, err := b.readNVPublic(h)
			if err != nil {
				return err
			}
			st.NV = append(st.NV, n.describe())
		}
		st.Algorithms, err = b.algorithms()
		return err
	})
	if err != nil {
		return nil, err
	}
	return st, nil
}

// algorithms asks for each algorithm of hsm's whether the TPM takes its parameters (TPM2_TestParms: Part 3, 30.3).
func (b *bus) algorithms() ([]hsm.Algorithm, error) {
	var have []hsm.Algorithm
	for _, alg := range hsm.Algorithms {
		spec, err := hsm.Spec{Name: "k", Algorithm: alg}.Resolved()
		if err != nil {
			return nil, err
		}
		t, err := template(spec)
		if errors.Is(err, hsm.ErrUnsupported) {
			continue
		}
		if err != nil {
			return nil, err
		}
		_, err = tpm2.TestParms{Parameters: tpm2.TPMTPublicParms{Type: t.Type, Parameters: t.Parameters}}.Execute(b)
		if err == nil {
			have = append(have, alg)
		} else if !refusesParameters(err) {
			return nil, err
		}
	}
	return have, nil
}

// propertyText reads text of four octets for each number. Untrusted: what cannot be printed is left out.
func propertyText(values ...uint32) string {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(b)))
}

// ResetLockout sets the count of failures to zero and ends a lockout, by the lockout authorization (Part 3, 25.2). A wrong one
// is refused, and is then itself locked for LockoutRecovery.
func (s *Store) ResetLockout(ctx context.Context) error {
	return s.do(ctx, "resetting the lockout", func(b *bus) error {
		return s.lockoutCommand(b, tpm2.TPMCCDictionaryAttackLockReset, nil)
	})
}

// SetLockout sets how many failures lock the TPM and how long they are remembered (Part 3, 25.3).
func (s *Store) SetLockout(ctx context.Context, maxFailures uint32, recovery, lockoutRecovery time.Duration) error {
	var p []byte
	for _, v := range []uint32{maxFailures, uint32(recovery / time.Second), uint32(lockoutRecovery / time.Second)} {
		p = binary.BigEndian.AppendUint32(p, v)
	}
	return s.do(ctx, "setting the lockout's parameters", func(b *bus) error {
		return s.lockoutCommand(b, tpm2.TPMCCDictionaryAttackParameters, p)
	})
}

// lockoutCommand runs a command with the lockout hierarchy for its only handle, which go-tpm does not have (v0.9.8).
func (s *Store) lockoutCommand(b *bus, code tpm2.TPMCC, parameters []byte) error {
	auth, err := s.hierarchy(b, tpm2.TPMRHLockout)
	if err != nil {
		return err
	}
	session := auth.Auth
	if err := session.Init(b); err != nil {
		return err
	}
	if err := session.NewNonceCaller(); err != nil {
		return err
	}
	names := []tpm2.TPM2BName{tpm2.HandleName(auth.Handle)}
	area, err := session.Authorize(code, parameters, nil, names, 0)
	if err != nil {
		return err
	}
	a := tpm2.Marshal(*area)
	be := binary.BigEndian
	command := be.AppendUint32(be.AppendUint16(nil, uint16(tpm2.TPMSTSessions)), uint32(headerSize+4+4+len(a)+len(parameters)))
	command = be.AppendUint32(be.AppendUint32(command, uint32(code)), uint32(auth.Handle))
	command = append(append(be.AppendUint32(command, uint32(len(a))), a...), parameters...)
	response, err := b.Send(command)
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(be.Uint32(response[6:])); rc != tpm2.TPMRCSuccess {
		if err := session.CleanupFailure(b); err != nil {
			return errors.Join(rc, err)
		}
		return rc
	}
	if len(response) < headerSize+4 || be.Uint32(response[headerSize:]) != 0 {
		return errors.New("the TPM's response is damaged")
	}
	answer, err := tpm2.Unmarshal[tpm2.TPMSAuthResponse](response[headerSize+4:])
	if err != nil {
		return err
	}
	return session.Validate(tpm2.TPMRCSuccess, code, nil, names, 0, answer)
}

// Flush flushes every transient object and session that is in the TPM and not this process's, and returns how many there
// were: what programs left that were killed, and what others may still be using. Behind a resource manager there are none.
func (s *Store) Flush(ctx context.Context) (int, error) {
	n := 0
	err := s.do(ctx, "flushing what others left", func(b *bus) error {
		if err := b.closeSession(); err != nil {
			return err
		}
		for _, first := range []tpm2.TPMHandle{0x80000000, loadedSessions, savedSessions} {
			all, err := b.handles(first)
			if err != nil {
				return err
			}
			for _, h := range all {
				if b.isLoaded(h) {
					continue
				}
				if err := b.flush(h); err != nil {
					return err
				}
				n++
			}
		}
		return nil
	})
	return n, err
}

// Clear makes the TPM forget its owner: the storage and endorsement hierarchies' authorization values, every key under the
// SRK, every persistent key and NV index of the owner's (Part 3, 24.6). The EK stays what it is. The store is of no more use
// and is to be opened again.
func (s *Store) Clear(ctx context.Context) error {
	return s.do(ctx, "clearing the TPM", func(b *bus) error {
		auth, err := s.hierarchy(b, tpm2.TPMRHLockout)
		if err != nil {
			return err
		}
		_, err = tpm2.Clear{AuthHandle: auth}.Execute(b)
		if err == nil {
			b.d.forget() // the TPM flushed what was loaded
		}
		return err
	})
}
