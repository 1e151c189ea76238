package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// A backup is a tar file: manifest.json, the store as service.db, the built-in hub's as hub.db where there is one, and the small public
// files of the data directory.
const (
	backupFormat   = "touchmark-backup/1"
	manifestName   = "manifest.json"
	maxManifest    = 4 << 20
	maxBackupFiles = 10_000
)

// manifest is what a backup says of itself.
type manifest struct {
	Format    string       `json:"format"`
	Created   time.Time    `json:"created"`
	Touchmark string       `json:"touchmark"`
	Wrapping  []string     `json:"wrapping"` // what the store's data keys are wrapped under, which is not in the backup
	Files     []backedFile `json:"files"`
}

type backedFile struct {
	Name   string `json:"name"` // with slashes
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // hex
}

// public reports whether a file of a data directory goes into a backup as it is. None of them is secret; what is, the store has
// encrypted, but the key that its data key is wrapped under.
func public(name string) bool {
	if !filepath.IsLocal(filepath.FromSlash(name)) || strings.ContainsAny(name, "\\\x00") {
		return false
	}
	dir, file := filepath.Split(name)
	switch first, _, _ := strings.Cut(dir, "/"); first {
	case "":
		return name == scopeFile || name == caFile || name == recipientFile
	case trustDir, ownersDir, intermediatesDir, "scopes":
		return strings.HasSuffix(file, ".pem") && !strings.HasPrefix(file, ".") && strings.Count(name, "/") <= 4
	}
	return false
}

type backupOptions struct {
	data, out string
	force     bool
	store     storeOptions
}

func newBackup(a *app) *cobra.Command {
	o := &backupOptions{}
	c := &cobra.Command{
		Use:   "backup --data DIR --out FILE",
		Short: "Copy a service's store to a file while the service runs",
		Long: `backup writes the store of a service into one file, as it was at one moment; the service goes on. The file appears whole or not at
all, and is checked. With serve --hub builtin the hub's devices and twins go along, as they were just after; its messages do not.

Secrets in it are encrypted as they are in the store. The key that their data key is wrapped under (data.key, or the one in a token) is
not in it: keep that somewhere else, for without it a backup is worth nothing.

A store in PostgreSQL is backed up with PostgreSQL's own means: pg_dump, or base backups with archived logs, which lose nothing.`,
		Example: `  touchmark backup --data service --out monday.tmbackup
  touchmark restore monday.tmbackup --data restored`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runBackup(cmd.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.data, "data", "", "data directory of the service (required)")
	f.StringVar(&o.out, "out", "", "file to write (required)")
	f.BoolVar(&o.force, "force", false, "overwrite the file")
	f.StringVar(&o.store.address, "store", "", "refused: see above")
	_ = f.MarkHidden("store")
	_ = c.MarkFlagRequired("data")
	_ = c.MarkFlagRequired("out")
	_ = c.MarkFlagDirname("data")
	return c
}

func (a *app) runBackup(ctx context.Context, o *backupOptions) (err error) {
	if dsn, err := o.store.dsn(a); err != nil || dsn != "" {
		return errors.Join(err, hint(usageError{errors.New("the store is in PostgreSQL, which backup does not copy")}, "use pg_dump, or base backups and archived logs"))
	}
	d := &serviceData{dir: o.data}
	if !exists(d.store()) {
		return hint(usageError{fmt.Errorf("%s holds no store", o.data)}, "--data names the data directory of a service; a store in PostgreSQL is backed up with pg_dump")
	}
	if !o.force && exists(o.out) {
		return hint(fmt.Errorf("%s exists already", o.out), "say --force to overwrite it")
	}
	work, err := os.MkdirTemp(filepath.Dir(o.out), ".backup-*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", o.out, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	m := &manifest{Format: backupFormat, Created: time.Now().UTC().Truncate(time.Second), Touchmark: versionText()}
	db := filepath.Join(work, storeFile)
	if err := sqlstore.Copy(ctx, d.store(), db); err != nil {
		return err
	}
	if m.Wrapping, err = sqlstore.Check(ctx, db); err != nil {
		return err
	}
	copies, paths, also := []string{storeFile}, map[string]string{storeFile: db}, ""
	if hub := d.path(hubFile); exists(hub) {
		// After the store: a device that the hub alone has registers again; one that the store alone had would stay away from it.
		paths[hubFile] = filepath.Join(work, hubFile)
		if err := sqlstore.Copy(ctx, hub, paths[hubFile]); err != nil {
			return err
		}
		if err := sqlstore.Intact(ctx, paths[hubFile]); err != nil {
			return err
		}
		copies, also = append(copies, hubFile), ", the built-in hub"
	}
	names, err := publicFiles(o.data)
	if err != nil {
		return err
	}
	for _, name := range append(copies, names...) {
		if paths[name] == "" {
			paths[name] = filepath.Join(o.data, filepath.FromSlash(name))
		}
		f := backedFile{Name: name}
		if f.Size, f.SHA256, err = digest(paths[name]); err != nil {
			return err
		}
		m.Files = append(m.Files, f)
	}
	packed := filepath.Join(work, "packed")
	if err := m.pack(packed, paths); err != nil {
		return fmt.Errorf("writing %s: %w", o.out, err)
	}
	if o.force {
		err = os.Rename(packed, o.out)
	} else {
		err = os.Link(packed, o.out)
	}
	if err == nil {
		err = syncDir(filepath.Dir(o.out))
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", o.out, err)
	}
	a.note("without %s the backup is worth nothing: keep that somewhere else", strings.Join(m.Wrapping, ", "))
	if a.json {
		return a.printJSON(m)
	}
	_, err = fmt.Fprintf(a.out, "%s: %d octets of store%s, and %d files\n", o.out, m.Files[0].Size, also, len(names))
	return err
}

// publicFiles lists what goes into a backup beside the store.
func publicFiles(dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err == nil && e.Type().IsRegular() && public(filepath.ToSlash(name)) {
			names = append(names, filepath.ToSlash(name))
		}
		return err
	})
	if len(names) >= maxBackupFiles {
		err = errors.Join(err, fmt.Errorf("%s holds %d files: a backup takes %d", dir, len(names), maxBackupFiles))
	}
	return names, err
}

func digest(path string) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return size, hex.EncodeToString(h.Sum(nil)), err
}

func (m *manifest) pack(out string, paths map[string]string) (err error) {
	f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	head, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	entry := func(name string, size int64) error {
		return w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: m.Created, Format: tar.FormatPAX})
	}
	if err := entry(manifestName, int64(len(head))); err != nil {
		return err
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	for _, b := range m.Files {
		if err := entry(b.Name, b.Size); err != nil {
			return err
		}
		in, err := os.Open(paths[b.Name])
		if err != nil {
			return err
		}
		_, err = io.Copy(w, io.LimitReader(in, b.Size))
		if err := errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), f.Sync())
}

func newRestore(a *app) *cobra.Command {
	var data string
	c := &cobra.Command{
		Use:   "restore FILE --data DIR",
		Short: "Make a service's data directory from a backup",
		Long: `restore takes a backup apart into a new directory, or an empty one, and checks every octet of it first. The service there then
has everything that was acknowledged before the backup began, and its own ID scope, CA and recipient; so has its built-in hub.
What it needs beside it is the key that the store's data key is wrapped under: data.key, or --data-key.

Devices that registered after the backup register again by themselves, and what was imported since is imported again. Never let
the restored service and the old one both answer devices.`,
		Example: `  touchmark restore monday.tmbackup --data restored
  cp safe/data.key restored/
  touchmark serve --data restored --hub hub-a.example.net`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.runRestore(cmd.Context(), args[0], data) },
	}
	c.Flags().StringVar(&data, "data", "", "directory to make (required)")
	_ = c.MarkFlagRequired("data")
	_ = c.MarkFlagDirname("data")
	return c
}

func (a *app) runRestore(ctx context.Context, file, data string) (err error) {
	dir, err := filepath.Abs(data)
	if err != nil {
		return err
	}
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return usageError{fmt.Errorf("%s is not empty: restore overwrites nothing", data)}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return usageError{err}
	}
	defer f.Close()
	work, err := os.MkdirTemp(filepath.Dir(dir), ".restore-*")
	if err != nil {
		return fmt.Errorf("restoring to %s: %w", data, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	m, err := unpack(f, work)
	if err != nil {
		return fmt.Errorf("backup %s is %w: %w", file, sqlstore.ErrDamaged, err)
	}
	if _, err := sqlstore.Check(ctx, filepath.Join(work, storeFile)); err != nil {
		return err
	}
	if hub := filepath.Join(work, hubFile); exists(hub) {
		if err := sqlstore.Intact(ctx, hub); err != nil {
			return err
		}
	}
	if err := syncTree(work); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := errors.Join(os.Rename(work, dir), syncDir(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("restoring to %s: %w", data, err)
	}
	a.note("the store opens with %s: give serve that key", strings.Join(m.Wrapping, ", "))
	if a.json {
		return a.printJSON(m)
	}
	_, err = fmt.Fprintf(a.out, "%s: as of %s\n", data, m.Created.Format(time.RFC3339))
	return err
}

// unpack takes a backup apart, which is untrusted: it holds what its manifest says, in that order, and nothing else.
func unpack(in io.Reader, dir string) (*manifest, error) {
	r := tar.NewReader(in)
	next := func(name string) (*tar.Header, error) {
		h, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("it is cut off, or none, before %s: %w", name, err)
		}
		if h.Typeflag != tar.TypeReg || h.Name != name {
			return nil, fmt.Errorf("%.100q is where %s should be", h.Name, name)
		}
		return h, nil
	}
	h, err := next(manifestName)
	if err != nil {
		return nil, err
	}
	if h.Size > maxManifest {
		return nil, errors.New("its manifest is too large")
	}
	m := &manifest{}
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(m); err != nil {
		return nil, fmt.Errorf("its manifest: %w", err)
	}
	if m.Format != backupFormat || len(m.Files) == 0 || len(m.Files) > maxBackupFiles || m.Files[0].Name != storeFile {
		return nil, fmt.Errorf("its manifest is not of a %s", backupFormat)
	}
	for i, b := range m.Files {
		store := i == 0 || i == 1 && b.Name == hubFile
		if !store && (!public(b.Name) || b.Size > maxPEM) {
			return nil, fmt.Errorf("%.100q has no place in a backup", b.Name)
		}
		h, err := next(b.Name)
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, filepath.FromSlash(b.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		mode := fs.FileMode(0o644)
		if store {
			mode = 0o600
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if err != nil {
			return nil, err
		}
		sum := sha256.New()
		n, err := io.Copy(io.MultiWriter(f, sum), r)
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			return nil, err
		}
		if n != b.Size || h.Size != b.Size || hex.EncodeToString(sum.Sum(nil)) != b.SHA256 {
			return nil, fmt.Errorf("%s is damaged", b.Name)
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		return nil, errors.New("it holds more than its manifest says")
	}
	return m, nil
}

func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return syncDir(path)
	})
}
