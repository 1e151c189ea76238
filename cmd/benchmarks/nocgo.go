//go:build !cgo

package main

import (
	"errors"

	"github.com/touchmark/touchmark/hsm"
)

var errNoCgo = errors.New("the token benchmarks need cgo")

func newToken() hsm.Store {
	check(errNoCgo)
	return nil
}

func (b *bench) tokenSign()    { check(errNoCgo) }
func (b *bench) tokenHMAC()    { check(errNoCgo) }
func (b *bench) tokenKeygen()  { check(errNoCgo) }
func (b *bench) tokenCrowded() { check(errNoCgo) }

type bareToken struct{}

func newBareToken(string) *bareToken { return nil }

func (*bareToken) close() {}

func (*bareToken) rate(int, func(func([]byte))) float64 { return 0 }
