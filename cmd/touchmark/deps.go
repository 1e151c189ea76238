package main

import (
	_ "filippo.io/age"
	_ "filippo.io/age/armor"
	_ "filippo.io/age/plugin"
	_ "filippo.io/age/tag"
	_ "filippo.io/hpke"
	_ "github.com/eclipse/paho.mqtt.golang"
	_ "github.com/gowebpki/jcs"
	_ "github.com/klauspost/compress/zstd"
	_ "github.com/miekg/pkcs11"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/pressly/goose/v3"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/secure-systems-lab/go-securesystemslib/dsse"
	_ "github.com/spf13/cobra"
	_ "github.com/spf13/cobra/doc"
	_ "go.step.sm/crypto/kms/uri"
	_ "go.step.sm/crypto/x509util"
	_ "golang.org/x/mod/sumdb/note"
	_ "golang.org/x/mod/sumdb/tlog"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
	_ "golang.org/x/time/rate"
	_ "modernc.org/sqlite"
)

func main() {}
