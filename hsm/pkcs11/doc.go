// Package pkcs11 keeps keys on PKCS#11 tokens (OASIS PKCS#11 2.40).
//
// The nouns are PKCS#11's: a module is a shared library; it has slots, some with a token; a session is opened on a token;
// keys are objects. [Open] loads the module that a key URI names, finds the token by label, serial or manufacturer, and
// logs in once. From then on a [Store] borrows a session per operation from a pool sized to the token, and keeps one more
// for itself, which holds the login.
//
// Key handles are kept with the keys. Objects are searched for by name when a key is opened, and again only after the
// token was lost: never once per device. What names are taken is read once, when the store is opened.
//
// Keys are made sensitive and non-extractable unless the spec says otherwise. A token that goes away is found again
// without a restart: the sessions are opened anew, the login is repeated with the PIN that was accepted before, and the
// operation is tried once more. A PIN that was refused is never tried again, and none is tried at all when the token says
// that one more failure would lock it.
//
// Tokens differ. What a token offers is read when it is opened, and [Store.Capabilities] tells what touchmark makes of it; a
// key that the token could make and not use is not made. Templates go from full to lean, points and public halves are taken
// in whatever form they come, PSS is padded outside where there is only raw RSA. A token whose session table is full is used
// with the sessions that there are, and one that is out of memory is made to let go by logging in anew. [Explain] tells what
// a token's answer means here.
//
// Counters ([hsm.CounterStore]) are private data objects that follow one another, "counter:NAME". They want a token that keeps such
// objects, which NSS's does not, and a module that shows one process what another did, which tpm2-pkcs11 does not. Whoever has the
// user PIN and a program of his own can set them back.
//
// A module-path that begins with "p11-kit:" has the module loaded in a process of its own, through p11-kit (its programs and
// client module must be installed). A module that crashes or hangs there costs the operation, which is repeated, and not the
// station: the process is killed, started again, and logged in to. It serves one call after the other, carries only what
// p11-kit knows (0.24: no agreement, no key wrap, no Ed25519), and ends with this process. A module in this process that
// hangs cannot be helped.
//
// A module that wants parameters gets them from x-init-reserved in the key URI, in CK_C_INITIALIZE_ARGS.pReserved: NSS, for
// one, wants "configdir='sql:DIR' certPrefix=” keyPrefix=” secmod='secmod.db' flags=".
//
// This is the only package with cgo. Without it Open answers hsm.ErrUnsupported.
package pkcs11
