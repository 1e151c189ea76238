//go:build !linux

package main

import "errors"

var errNoTPM = errors.New("the TPM benchmarks need Linux")

func (b *bench) tpmCreate() { check(errNoTPM) }
func (b *bench) tpmSign()   { check(errNoTPM) }
