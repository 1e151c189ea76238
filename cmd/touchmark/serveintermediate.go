package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/ca"
)

// intermediatesDir is the folder of a service's data directory with the CA certificates that devices leave out.
const intermediatesDir = "intermediates"

func intermediateFlag(c *cobra.Command, files *[]string) {
	c.Flags().StringArrayVar(files, "intermediate", nil, "PEM file with CA certificates between devices and groups' CAs, for devices that send their own alone, from now on; again for more")
}

// intermediates puts new CA certificates into the folder, and returns all that are in it.
func (d *serviceData) intermediates(files []string) ([]*x509.Certificate, error) {
	if d.dir != "" {
		if err := os.MkdirAll(d.path(intermediatesDir), 0o700); err != nil {
			return nil, err
		}
	}
	var all []*x509.Certificate
	for _, f := range files {
		certs, err := readCertificates(f)
		if err != nil {
			return nil, usageError{fmt.Errorf("--intermediate: %w", err)}
		}
		for _, c := range certs {
			if err := attest.CheckCA(c); err != nil {
				return nil, usageError{fmt.Errorf("--intermediate %s: %w", f, err)}
			}
			if time.Now().After(c.NotAfter) {
				return nil, usageError{fmt.Errorf("--intermediate %s: %q has expired", f, c.Subject)}
			}
			sum := sha256.Sum256(c.Raw)
			if _, err := d.ensure(filepath.Join(intermediatesDir, hex.EncodeToString(sum[:])+".pem"), 0o644, func() ([]byte, error) { return ca.EncodeChain(c), nil }); err != nil {
				return nil, err
			}
		}
		all = append(all, certs...)
	}
	if d.dir == "" {
		return all, nil
	}
	all = nil // with those of the folder, and once
	names, err := filepath.Glob(d.path(filepath.Join(intermediatesDir, "*.pem")))
	if err != nil {
		return nil, err
	}
	for _, name := range names { // one that expired since is of no use, and no reason not to start
		certs, err := readCertificates(name)
		if err != nil {
			return nil, err
		}
		for _, c := range certs {
			if err := attest.CheckCA(c); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		all = append(all, certs...)
	}
	return all, nil
}
