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
// This is the only package with cgo. Without it Open answers hsm.ErrUnsupported.
package pkcs11
