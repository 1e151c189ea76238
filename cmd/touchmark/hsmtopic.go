package main

import "github.com/spf13/cobra"

var hsmTopic = &cobra.Command{
	Use:   "hsm",
	Short: "Tokens, TPMs, key URIs and PINs, in ten minutes",
	Long: `Keys that matter are made where they cannot be copied from: in a PKCS#11 token (an HSM, a smart card, SoftHSM to try things
out) or in a device's TPM. touchmark names such a place by a key URI, and works with it by name and never by slot number.

TOKENS
  A PKCS#11 module is the library that a token's maker ships. What does it reach?

    touchmark token list --module /usr/lib/softhsm/libsofthsm2.so

  A blank token gets a label, a PIN for its security officer (SO) and the PIN that work is done with:

    touchmark token init 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin' \
        --so-pin-source /run/secrets/so-pin

KEY URIS
  pkcs11:token=LABEL;serial=…;object=KEY?module-path=LIBRARY&pin-source=file:PATH    a token, or a key on it (RFC 7512)
  pkcs11:…?module-path=p11-kit:LIBRARY      the module in a process of its own: one that hangs or crashes is started again
  pkcs11:…?x-init-reserved=TEXT             what the module wants to be initialized with, as NSS does
  file:DIR                                  encrypted key files, where there is no token; file:DIR?object=NAME is one key there
  tpm:object=KEY?device=/dev/tpmrm0&keys=DIR  a TPM 2.0, or a key blob for it; unix:PATH and tcp:HOST:PORT for one elsewhere

  TOUCHMARK_PKCS11_MODULE stands in for module-path. Quote URIs: shells take ; and & for themselves.

PINS
  A PIN comes from pin-source, else from TOUCHMARK_PIN_FILE or TOUCHMARK_PIN, else from a prompt; never from the command line,
  which everybody on the machine can read. A wrong PIN is tried once. None is tried when the token says that one try is left.

BEFORE A SHIFT
    touchmark token doctor --line line-3

     ok   clock                2026-11-21T06:00:00Z, not before the CA or the ledger's last entry
     ok   module               /usr/lib/softhsm/libsofthsm2.so, Implementation of PKCS11 2.6 (PKCS#11 2.40)
     ok   token                "line-3", serial 7758244885b752c6, SoftHSM project SoftHSM v2, firmware 2.6
    warn  user PIN             a wrong one was tried since the last right one
                               → find out who has a wrong PIN before it locks
     ok   mechanisms           all 4 that are needed are there
     ok   login                the PIN is right
     ok   a key made and used  made, signed with, read back and destroyed in 62ms; it never leaves the token

  token show says what a token can do and how touchmark works around what it cannot; token bench says how fast it is.

KEYS
    touchmark key new --line line-3 --name spare --algorithm EC-P384
    touchmark key sign --line line-3 --name spare --in release.tar --out release.sig
    touchmark key evidence --line line-3 --name spare --out spare.evidence

  Keys never leave, unless they were made to (key new --extractable): then key wrap moves them to another token, encrypted.

DEVICES
  A profile says where a device's private key is made:

    [key]
    in = "memory"     stamped into the device's storage, and forgotten
    in = "token"      in the line's token, where it stays; or in the device's own, by
    store = "pkcs11:token={serial}?module-path=…"
    in = "tpm"        in the device's TPM, which alone can use the blob that the stamp holds:
    store = "tpm:?device=tcp:fixture-{head}:2321"
    in = "csr"        in the device, which hands out a certificate signing request

  Where the token or the TPM vouches for a key, the bundle carries the evidence: bundle verify --require-residency token, or
  tpm. A TPM's evidence holds with no TPM at hand; --makers DIR wants its endorsement key certified by one of those makers.

TPMS
    touchmark tpm doctor --tpm 'tpm:?device=unix:/run/swtpm.sock'

     ok   answers                  unix:/run/swtpm.sock, IBM SW TPM firmware 8217.4131.22.13878, TPM 2.0 revision 1.64
     ok   not locked               no: 0 of 3 failures, one forgiven every 16m40s
     ok   free slots               3 of 3
     ok   storage root key         the owner's primary (ECC P-256)
     ok   makes and uses a key     EC P-256 made in 2.4ms, signs in 800µs
     ok   endorsement certificate  none, and none asked for: --makers was not given

  tpm ek shows the registration ID that device SDKs derive, tpm nv what is in its memory, tpm lockout how many tries are left.
  A profile with attestation = "tpm" writes down the TPM itself, for a service that challenges it. This is all of it, as
  line/profiles/tpm.toml:

    attestation = "tpm"
    enrollment = "individual"
    [key]
    store = "tpm:?device=tcp:{tpm}"       # tpm is a column of the serial list; with unix:{tpm} it is a path

  and with it a serial list that names the TPM of each device as the station reaches it, then mint and the device's first call:

    serial,tpm
    PUMP-001,fixture-1:2321

    touchmark mint --line line --profile tpm --serials tpms.csv --out stamps --bundle tpm.tmb
    touchmark register --stamp stamps/REGISTRATION-ID --tpm 'tpm:?device=/dev/tpmrm0' --endpoint HOST:PORT --ca ca.pem

COUNTERS
    touchmark token counter list --line line-3

  A token or a TPM can hold counters that only go up. A ledger that is copied, or set back, shows: the counter did not go back
  with it. One process at a time holds a counter. After a power cut its claim may be left behind: token counter show says whose
  it is, token counter takeover ends it. A TPM's counter never goes back; a token's does for whoever has the PIN and writes a
  program for it.`,
}
