package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// storeOptions say where a service's store is, and what its secrets are under.
type storeOptions struct {
	address, addressFile string
	connections          int
	dataKey, dataKeyFile string
}

func (o *storeOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.address, "store", "", "address of a PostgreSQL database to keep the store in, postgres://USER@HOST/DATABASE, without a password (default: a file in --data; also $TOUCHMARK_STORE)")
	f.StringVar(&o.addressFile, "store-file", "", "file that holds the address, which may have a password in it (also $TOUCHMARK_STORE_FILE)")
	f.IntVar(&o.connections, "store-connections", 8, "connections to the database at most")
	f.StringVar(&o.dataKey, "data-key", "", "key URI of the key in a token, TPM or key-file store that the store's data key is wrapped under: AES-256 or HMAC-SHA256 (default: a file)")
	f.StringVar(&o.dataKeyFile, "data-key-file", "", "file of 32 octets that the store's data key is wrapped under; replicas share it (default: data.key in --data, made at the first start)")
	c.MarkFlagsMutuallyExclusive("store", "store-file")
	c.MarkFlagsMutuallyExclusive("data-key", "data-key-file")
}

// dsn returns the address of the database, or nothing for a file.
func (o *storeOptions) dsn(a *app) (string, error) {
	address, file, named := o.address, o.addressFile, true
	if address == "" && file == "" {
		address, file, named = a.getenv("TOUCHMARK_STORE"), a.getenv("TOUCHMARK_STORE_FILE"), false
	}
	if file != "" {
		b, err := readSmall(file)
		if err != nil {
			return "", usageError{fmt.Errorf("reading the database's address: %w", err)}
		}
		return strings.TrimSpace(string(b)), nil
	}
	if !named || address == "" {
		return address, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", usageError{errors.New("--store: want postgres://USER@HOST/DATABASE")} // the parser's error shows it
	}
	if _, has := u.User.Password(); has || u.Query().Has("password") || u.Query().Has("sslpassword") {
		return "", hint(usageError{errors.New("--store holds a password, which everybody on this machine can read there")},
			"put the address into a file of mode 0600 and name it with --store-file, or the password into a PGPASSFILE")
	}
	return address, nil
}

// open opens the store of a service, with what the replicas of the service share. The caller closes both.
func (o *storeOptions) open(ctx context.Context, a *app, d *serviceData, log *slog.Logger) (_ *sqlstore.Store, _ func() error, err error) {
	cfg := sqlstore.Config{Path: d.store(), Connections: o.connections, Log: log}
	if d.dir != "" {
		if cfg.DSN, err = o.dsn(a); err != nil {
			return nil, nil, err
		}
		if cfg.DSN != "" {
			if cfg.Path = ""; !strings.HasPrefix(cfg.DSN, "postgres://") && !strings.HasPrefix(cfg.DSN, "postgresql://") {
				return nil, nil, usageError{errors.New("--store: a database's address begins with postgres://")} // it is not shown: it may hold a password
			}
		}
	}
	var keys hsm.Store
	made := false
	switch {
	case o.dataKey != "":
		if keys, cfg.Wrapping, err = a.wrappingKey(ctx, o.dataKey); err != nil {
			return nil, nil, err
		}
		// A store from before there were data keys needs the key that it was under once more.
		if cfg.DataKey, err = readSmall(d.path(dataKeyFile)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	case o.dataKeyFile != "":
		if cfg.DataKey, err = readSmall(o.dataKeyFile); err != nil {
			err = usageError{fmt.Errorf("--data-key-file: %w", err)}
		}
	default:
		if cfg.DataKey, err = d.ensure(dataKeyFile, 0o600, func() ([]byte, error) { made = true; return d.seed.Bytes("data key", 32), nil }); err != nil {
			err = fmt.Errorf("data key: %w", err)
		}
	}
	var store *sqlstore.Store
	if err == nil {
		store, err = sqlstore.Open(ctx, cfg)
	}
	if err != nil {
		if errors.Is(err, sqlstore.ErrWrongKey) {
			if made {
				err = errors.Join(err, os.Remove(d.path(dataKeyFile)))
			}
			err = hint(err, "give this service the key that the store was made with: its data.key, or --data-key-file or --data-key as the other replicas have it (touchmark help store)")
		}
		if keys != nil {
			err = errors.Join(err, keys.Close())
		}
		return nil, nil, err
	}
	if d.dir != "" {
		d.share = func(name string, local []byte, make func() ([]byte, error)) ([]byte, error) {
			return shareFile(ctx, store, name, local, make)
		}
		d.secretsShared = cfg.DSN != ""
	}
	return store, func() error {
		err := store.Close()
		if keys != nil {
			err = errors.Join(err, keys.Close())
		}
		return err
	}, nil
}

// wrappingKey opens the key that data keys are wrapped under.
func (a *app) wrappingKey(ctx context.Context, raw string) (hsm.Store, *sqlstore.WrappingKey, error) {
	uri, err := hsm.ParseURI(raw)
	if err == nil && uri.Object == "" {
		err = fmt.Errorf("it names a store, and no key in it: %s", wantObject)
	}
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("--data-key: %w", err)}
	}
	keys, err := a.openStore(ctx, raw, "")
	if err != nil {
		return nil, nil, err
	}
	key, err := keys.Open(ctx, uri.Object)
	if err == nil {
		var w *sqlstore.WrappingKey
		if w, err = sqlstore.TokenKey(keys, key); err == nil {
			return keys, w, nil
		}
	}
	return nil, nil, errors.Join(fmt.Errorf("--data-key: %w", err), keys.Close())
}

// sharedFiles are those of the data directory that all replicas of a service have the same, and that a restored store brings
// along: they are in the store too, encrypted.
var sharedFiles = []string{scopeFile, identityFile, caKeyFile, caFile, managementTokenFile, hubKeyFile}

// shareFile returns what all replicas have under a name: what the store has, or else what this one has, or makes, which is then
// the others' too.
func shareFile(ctx context.Context, store registration.Store, name string, local []byte, make func() ([]byte, error)) (kept []byte, err error) {
	const everybody = "" // no ID scope's
	get := func(tx registration.Tx) error {
		kept, err = tx.Secret(everybody, "file "+name)
		return err
	}
	if err = store.View(ctx, get); errors.Is(err, registration.ErrNotFound) {
		err = store.Update(ctx, func(tx registration.Tx) error {
			if err := get(tx); !errors.Is(err, registration.ErrNotFound) {
				return err
			}
			if kept = local; kept == nil {
				if kept, err = make(); err != nil {
					return err
				}
			}
			return tx.PutSecret(everybody, "file "+name, kept)
		})
	}
	if err == nil && local != nil && !bytes.Equal(local, kept) {
		err = hint(fmt.Errorf("the store has another %s than the data directory: it was made by another replica, or before", name), "move the directory's own away to take the store's")
	}
	return kept, err
}

const storeHelp = `A service keeps everything that it remembers in its store: a SQLite file in the data directory, or a database that speaks
PostgreSQL's protocol. What is in the store stays where the store is, and nowhere else.

ONE MACHINE
  touchmark serve --data service            keeps service/service.db; one process at a time

REPLICAS
  Any number of services may work on one database: devices and operators may meet another one with every request, and one that dies
  takes nothing along. Give each a data directory of its own, the same database and the same data key:

    createdb --encoding UTF8 --locale C --template template0 touchmark
    head -c 32 /dev/urandom > data.key                                    (mode 0600, the same file for all)
    touchmark serve --data replica-1 --store postgres://touchmark@db.example.net/touchmark?sslmode=verify-full --data-key-file data.key

  ID scope, recipient, CA and secrets are in the database, encrypted, and all replicas' the same. Public keys in trust and owners, and
  what flags name, are each replica's own: start all of them alike. A password goes into PGPASSFILE or PGPASSWORD, or with the address
  into --store-file or TOUCHMARK_STORE; never into --store. What is deleted or changed at one replica is so at the others at once; a
  device may hear for ten seconds more of the operation that it began, and for a second that there is no scope when it asked before
  the scope was made. Keep the clocks of all replicas within five seconds of each other: what is told to hubs is shared out among
  them by time.

  --store-connections (8) is for each replica. More help where the database is far away, and cost where many devices with
  neighbouring IDs come at once. When the database is not reached for 20 seconds, callers read 503 and come again.

WHAT IS ENCRYPTED
  Symmetric keys, keys of policies, connection strings of hubs, settings of scopes, enrollments that name a webhook, device keys
  and what TPMs are challenged with: by AES-256-GCM, under a data key that is in the store, wrapped. The key that it is wrapped under is not: data.key in the data
  directory, --data-key-file, or --data-key: one in a token or TPM that never leaves it. Without it nobody reads a secret in the
  store, nor in a copy of it; nor do you. Keep a copy of it apart from the backups.

    touchmark store rotate-key --data service       a new data key, while the service runs
    touchmark store rewrap --data service --to-key 'pkcs11:token=service;object=store-key'

  The service changes the data key by itself before it has been used too often for AES-GCM.

BACKUP
  touchmark backup copies a SQLite store while the service runs, and the built-in hub's file where there is one; touchmark restore makes
  a data directory of it. For PostgreSQL use its own means; a standby and archived logs lose nothing.

WHEN A MACHINE IS LOST
  One machine: restore the last backup on another with the same data key, at the same address. What was acknowledged since is gone with
  the disk: devices register again by themselves, enrollments since then are imported again, which changes nothing that is there. Who
  cannot have that takes a database with a standby: replicas go on where it does, and devices meet them with their next try.

WHAT IS KEPT OF DEVICES, AND FOR HOW LONG
  Registrations until they are deleted (touchmark registration delete), an individual enrollment's with the enrollment. Attempts for
  serve --attempts-retention, a month, by registration ID, address and certificate, or until touchmark registration forget. Usage counts
  name no device. The audit record names enrollments, and is never shortened while its scope is there. touchmark scope delete erases
  everything of a scope, touchmark scope erase all but its settings, and so does for the first scope, from the file too: help management
  says how far. What one device leaves behind, and how that goes: help operating.`

func newStore(a *app) *cobra.Command {
	c := parent("store", "Look after the store of a registration service", newStoreRotate(a), newStoreRewrap(a))
	c.Long = storeHelp
	return c
}

// withServiceStore opens the store of a service that runs, or does not.
func (a *app) withServiceStore(ctx context.Context, data string, o *storeOptions, f func(*sqlstore.Store) error) (err error) {
	dir, err := filepath.Abs(data)
	if err != nil {
		return err
	}
	d := &serviceData{dir: dir}
	if dsn, err := o.dsn(a); err != nil {
		return err
	} else if dsn == "" && !exists(d.store()) {
		return usageError{fmt.Errorf("%s holds no store: want the data directory of a service", data)}
	}
	store, closeStore, err := o.open(ctx, a, d, slog.New(slog.NewTextHandler(a.err, nil)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore()) }()
	return f(store)
}

func newStoreRotate(a *app) *cobra.Command {
	o, data := &storeOptions{}, ""
	c := &cobra.Command{
		Use:   "rotate-key --data DIR",
		Short: "Change the key that secrets in the store are encrypted with",
		Long: `rotate-key makes a new data key and encrypts every secret in the store anew with it, in small transactions; the old key is
dropped when none is left under it. The service may run meanwhile, and uses the new key at once. A run that was interrupted is
finished by the service, or by the next run.`,
		Example: `  touchmark store rotate-key --data service`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withServiceStore(cmd.Context(), data, o, func(s *sqlstore.Store) error {
				if err := s.Rotate(cmd.Context()); err != nil {
					return err
				}
				if _, err := s.Reseal(cmd.Context()); err != nil {
					return err
				}
				return a.printKeys(cmd.Context(), s)
			})
		},
	}
	o.flags(c)
	c.Flags().StringVar(&data, "data", "", "data directory of the service (required)")
	_ = c.MarkFlagRequired("data")
	_ = c.MarkFlagDirname("data")
	return c
}

// printKeys shows the store's data keys.
func (a *app) printKeys(ctx context.Context, s *sqlstore.Store) error {
	keys, err := s.DataKeys(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"dataKeys": keys})
	}
	var rows [][]string
	for _, k := range keys {
		rows = append(rows, []string{fmt.Sprint(k.ID), k.Created.Format("2006-01-02 15:04"), fmt.Sprint(k.Seals), k.Wrapping})
	}
	return a.table([]string{"DATA KEY", "MADE", "USED AT MOST", "WRAPPED UNDER"}, rows)
}

func newStoreRewrap(a *app) *cobra.Command {
	o, data := &storeOptions{}, ""
	var key, file string
	c := &cobra.Command{
		Use:   "rewrap --data DIR {--to-key URI | --to-key-file FILE}",
		Short: "Wrap the store's data key under another key",
		Long: `rewrap puts the store's data key under another key: one in a token, in a TPM or in a file. The secrets themselves stay as they
are. From then on serve and its neighbours need the new key (--data-key or --data-key-file), and the old one opens nothing; a
service that runs goes on until it is started again.`,
		Example: `  touchmark key new --store 'pkcs11:token=service' --name store-key --algorithm AES-256
  touchmark store rewrap --data service --to-key 'pkcs11:token=service;object=store-key'
  touchmark serve --data service --data-key 'pkcs11:token=service;object=store-key'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withServiceStore(cmd.Context(), data, o, func(s *sqlstore.Store) error {
				var to *sqlstore.WrappingKey
				if key != "" {
					keys, w, err := a.wrappingKey(cmd.Context(), key)
					if err != nil {
						return err
					}
					defer keys.Close()
					to = w
				} else {
					b, err := readSmall(file)
					if err == nil {
						to, err = sqlstore.KeyFile(b)
					}
					if err != nil {
						return usageError{fmt.Errorf("--to-key-file: %w", err)}
					}
				}
				if err := s.Rewrap(cmd.Context(), to); err != nil {
					return err
				}
				return a.printKeys(cmd.Context(), s)
			})
		},
	}
	o.flags(c)
	f := c.Flags()
	f.StringVar(&data, "data", "", "data directory of the service (required)")
	f.StringVar(&key, "to-key", "", "key URI of the new key")
	f.StringVar(&file, "to-key-file", "", "file of 32 octets with the new key")
	_ = c.MarkFlagRequired("data")
	_ = c.MarkFlagDirname("data")
	c.MarkFlagsOneRequired("to-key", "to-key-file")
	c.MarkFlagsMutuallyExclusive("to-key", "to-key-file")
	return c
}
