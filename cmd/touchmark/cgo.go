//go:build cgo

package main

// cgoBuild says whether this build can load PKCS#11 modules.
const cgoBuild = true
