package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/tpm"
)

type nvOptions struct {
	index, in, out string
	size           int
	force, yes     bool
}

// maxNVFile bounds the data for an NV index.
const maxNVFile = 4096

func nvText(n tpm.NVIndex) string {
	var words []string
	for _, w := range []struct {
		is   bool
		word string
	}{{n.Written, "written"}, {n.WriteLocked, "locked"}, {n.Platform, "the platform's"}, {n.AnyRead, "anybody reads"}} {
		if w.is {
			words = append(words, w.word)
		}
	}
	return fmt.Sprintf("0x%08x, %d octets, %s", n.Index, n.Size, strings.Join(words, ", "))
}

func parseIndex(s string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 32)
	if err != nil || n>>24 != 1 {
		return 0, usageError{fmt.Errorf("--index %s: want an NV index in hexadecimal, 0x01800001 for instance", s)}
	}
	return uint32(n), nil
}

func newTPMNV(a *app, o *tpmOptions) *cobra.Command {
	n := &nvOptions{}
	// with makes a command that works on one index.
	with := func(use, short, example string, run func(context.Context, *tpm.Store, uint32) error) *cobra.Command {
		c := &cobra.Command{
			Use: use, Short: short, Args: cobra.NoArgs, Example: example,
			RunE: func(cmd *cobra.Command, _ []string) error {
				index, err := parseIndex(n.index)
				if err != nil {
					return err
				}
				return a.withTPM(cmd.Context(), o, func(s *tpm.Store) error { return run(cmd.Context(), s, index) })
			},
		}
		c.Flags().StringVar(&n.index, "index", "", "the NV index, 0x01800000 to 0x01bfffff for one's own (required)")
		_ = c.MarkFlagRequired("index")
		return c
	}
	done := func(index uint32, what string) error {
		if a.json {
			return a.printJSON(map[string]any{"index": fmt.Sprintf("0x%08x", index), "done": what})
		}
		_, err := fmt.Fprintf(a.out, "NV index 0x%08x: %s\n", index, what)
		return err
	}
	list := &cobra.Command{
		Use: "list", Short: "List the NV indices", Args: cobra.NoArgs,
		Example: "  touchmark tpm nv list",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withTPM(cmd.Context(), o, func(s *tpm.Store) error {
				all, err := s.ListNV(cmd.Context())
				if err != nil {
					return err
				}
				var rows [][]string
				for _, x := range all {
					if a.json {
						if err := a.printJSON(x); err != nil {
							return err
						}
					}
					rows = append(rows, []string{fmt.Sprintf("0x%08x", x.Index), fmt.Sprint(x.Size), yesNo(x.Written), yesNo(x.WriteLocked), yesNo(x.AnyRead), yesNo(x.Platform)})
				}
				if a.json {
					return nil
				}
				return a.table([]string{"INDEX", "SIZE", "WRITTEN", "LOCKED", "ANYBODY READS", "PLATFORM'S"}, rows)
			})
		},
	}
	define := with("define --index I --size N", "Make an NV index that the owner writes and anybody reads", "  touchmark tpm nv define --index 0x01800001 --size 256",
		func(ctx context.Context, s *tpm.Store, index uint32) error {
			if n.size < 1 || n.size > maxNVFile {
				return usageError{fmt.Errorf("--size %d: want 1 to %d", n.size, maxNVFile)}
			}
			if err := s.DefineNV(ctx, index, n.size); err != nil {
				return err
			}
			return done(index, "defined")
		})
	define.Flags().IntVar(&n.size, "size", 0, "octets (required)")
	_ = define.MarkFlagRequired("size")
	write := with("write --index I --in FILE", "Write a file to an NV index, and read it back", "  touchmark tpm nv write --index 0x01800001 --in provisioning.json",
		func(ctx context.Context, s *tpm.Store, index uint32) error {
			data, err := a.readInput(n.in, maxNVFile)
			if err != nil {
				return err
			}
			if err := s.WriteNV(ctx, index, data); err != nil {
				return err
			}
			return done(index, fmt.Sprintf("%d octets written and read back", len(data)))
		})
	write.Flags().StringVar(&n.in, "in", "", "the file, or - for standard input (required)")
	_ = write.MarkFlagRequired("in")
	lock := with("lock --index I", "Lock an NV index against writing until it is deleted", "  touchmark tpm nv lock --index 0x01800001",
		func(ctx context.Context, s *tpm.Store, index uint32) error {
			if err := s.LockNV(ctx, index); err != nil {
				return err
			}
			return done(index, "locked")
		})
	read := with("read --index I", "Read an NV index whole", "  touchmark tpm nv read --index 0x01800001 --out provisioning.bin",
		func(ctx context.Context, s *tpm.Store, index uint32) error {
			data, err := s.ReadNV(ctx, index)
			if err != nil {
				return err
			}
			switch {
			case a.json:
				return a.printJSON(map[string]any{"index": fmt.Sprintf("0x%08x", index), "data": data})
			case n.out == "" || n.out == "-":
				_, err = a.out.Write(data)
				return err
			}
			return writeFile(n.out, data, 0o600, n.force)
		})
	read.Flags().StringVar(&n.out, "out", "", "write to this file instead of standard output")
	read.Flags().BoolVar(&n.force, "force", false, "overwrite the file")
	del := with("delete --index I", "Delete an NV index and what is in it", "  touchmark tpm nv delete --index 0x01800001 --yes",
		func(ctx context.Context, s *tpm.Store, index uint32) error {
			name := fmt.Sprintf("0x%08x", index)
			if err := a.confirm(ctx, n.yes, "deleting NV index "+name, name); err != nil {
				return err
			}
			if err := s.DeleteNV(ctx, index); err != nil {
				return err
			}
			return done(index, "deleted")
		})
	del.Flags().BoolVar(&n.yes, "yes", false, "do not ask")
	return parent("nv", "The TPM's non-volatile memory", list, define, write, lock, read, del)
}
