// Package tpm keeps keys in a TPM 2.0 (TCG TPM 2.0 Library, revision 1.59).
//
// A key is a blob: made by the TPM under its storage root key (SRK), encrypted by it, and of use in that TPM only. The blob
// lies in a directory as NAME.pem, a "TSS2 PRIVATE KEY" that OpenSSL's tpm2 provider reads too. The SRK is the one at
// persistent handle 0x81000001 where that fits a storage key, and otherwise the ECC P-256 primary of the owner hierarchy,
// which every TPM makes anew from its seed. A key may also live at a persistent handle in the TPM's own memory; then it is
// called by that handle, "0x81000100".
//
// [Open] connects to the TPM that a key URI names and returns a [Store]: hsm's contract. Beyond that contract it reads the
// TPM's endorsement key and its certificate ([Store.EK]), makes NV indices ([Store.DefineNV] and its neighbours), shows what
// state the TPM is in ([Store.State]), takes in the key that a device registration service hands out ([Store.Identity]) and has
// an attestation key vouch for a device key ([Store.Attest]); the subpackage residency judges certificates and proofs with no
// TPM at hand.
//
// Counters ([hsm.CounterStore]) are NV counter indices, of 0x01b70000 to 0x01b7003f the first that is free; 0x100 above each is who
// holds it. A TPM's memory wears: its makers have some hundred thousand increments in mind, or answer TPM_RC_NV_RATE for a while, so
// a counter is for batches and checkpoints rather than for each signature.
//
// # Sharing a TPM
//
// A TPM does one thing at a time. Stores of one process on one TPM share one connection and take turns. A device without a
// resource manager (a socket, /dev/tpm0) is given back, empty, when it was idle for a moment or held for two seconds, so that
// other programs have their turn; prefer /dev/tpmrm0 where there is one. Never more than three transient objects are loaded
// at once, and what is loaded is flushed on every path.
//
// A TPM that goes away is dialled again for some seconds, and what was loaded is loaded anew: the store need not be reopened.
// After that the error is hsm.ErrLost.
//
// # Secrets on the wire
//
// Authorization values, keys on their way into the TPM and those on their way out travel inside sessions salted to the SRK,
// with the parameter encrypted, or wrapped for the SRK. The SRK's public area is read when the store is opened, and an SRK of
// another name is refused from then on; whoever could already answer in the TPM's place at that moment is not kept out.
//
// Keys are made fixedTPM, fixedParent and noDA: they never leave, and a wrong authorization value does not lock the TPM. It
// is tried once all the same. Pairs that were made elsewhere cannot be fixedTPM; they are wrapped for the SRK, and no policy
// lets them go on from there.
//
// # Limits
//
// Ed25519 is not in TPM 2.0, RSA 3072 and 4096 not in most: hsm.ErrUnsupported. A discrete TPM takes tens of milliseconds for a
// signature and seconds to minutes for an RSA key. Signatures have no context, so they wait for a TPM's answer for up to
// three minutes; everything else ends with its context.
package tpm
