//go:build cgo

package sqlstore_test

// cgo says that PKCS#11 modules can be loaded.
const cgo = true
