//go:build !cgo

package sqlstore_test

const cgo = false
