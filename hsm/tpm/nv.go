package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// maxNV bounds what is read from or written to an NV index, in octets. TPMs have some kilobytes for all of them.
const maxNV = 64 << 10

// An NVIndex is a piece of the TPM's non-volatile memory.
type NVIndex struct {
	// Index is its handle: 0x01…… .
	Index uint32 `json:"index"`
	// Size is in octets.
	Size int `json:"size"`
	// Written: something was written to it. WriteLocked: nothing can be written to it now.
	Written     bool `json:"written"`
	WriteLocked bool `json:"writeLocked"`
	// Lockable: a write lock stays until the index is deleted, over restarts.
	Lockable bool `json:"lockable"`
	// OwnerWrite and AnyRead: the owner writes, and anybody reads without an authorization value.
	OwnerWrite bool `json:"ownerWrite"`
	AnyRead    bool `json:"anyRead"`
	// Platform: the platform's firmware made it, and the owner cannot delete it.
	Platform bool `json:"platform"`
}

// checkIndex wants an NV index of those that an owner may define (TCG Registry of Reserved TPM 2.0 Handles, 2.2): what is the
// manufacturer's and the TCG's is left alone.
func checkIndex(index uint32) error {
	if index < 0x01800000 || index > 0x01bfffff {
		return fmt.Errorf("NV index 0x%08x: want one of the owner's, 0x01800000 to 0x01bfffff", index)
	}
	return nil
}

// nv is an NV index as commands want it.
type nv struct {
	tpm2.NamedHandle
	public tpm2.TPMSNVPublic
}

func (b *bus) readNVPublic(h tpm2.TPMHandle) (*nv, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: h}.Execute(b)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, fmt.Errorf("NV index 0x%08x: %w", uint32(h), hsm.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	p, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	return &nv{tpm2.NamedHandle{Handle: h, Name: rsp.NVName}, *p}, nil
}

func (n *nv) describe() NVIndex {
	a := n.public.Attributes
	return NVIndex{
		Index: uint32(n.Handle), Size: int(n.public.DataSize), Written: a.Written, WriteLocked: a.WriteLocked, Lockable: a.WriteDefine,
		OwnerWrite: a.OwnerWrite, AnyRead: a.AuthRead, Platform: a.PlatformCreate,
	}
}

// ListNV lists the NV indices, by handle.
func (s *Store) ListNV(ctx context.Context) ([]NVIndex, error) {
	var all []NVIndex
	err := s.do(ctx, "listing NV indices", func(b *bus) error {
		all = nil
		handles, err := b.handles(0x01000000)
		if err != nil {
			return err
		}
		for _, h := range handles {
			n, err := b.readNVPublic(h)
			if err != nil {
				return err
			}
			all = append(all, n.describe())
		}
		return nil
	})
	return all, err
}

// DefineNV makes an NV index of that size, which the owner writes and anybody reads, and whose write lock lasts (Part 3, 31.3).
// The error is hsm.ErrExists when it is taken.
func (s *Store) DefineNV(ctx context.Context, index uint32, size int) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	if size < 1 || size > 4096 {
		return fmt.Errorf("NV index 0x%08x: want a size of 1 to 4096 octets", index)
	}
	public := tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(index), NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(size),
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, WriteDefine: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}
	want, err := tpm2.NVName(&public)
	if err != nil {
		return err
	}
	tried := false
	return s.do(ctx, fmt.Sprintf("defining NV index 0x%08x", index), func(b *bus) error {
		if tried {
			if n, err := b.readNVPublic(tpm2.TPMHandle(index)); err == nil && sameName(n.Name, *want) {
				return nil // before the connection broke
			}
		}
		tried = true
		return s.define(b, public)
	})
}

func (s *Store) define(b *bus, public tpm2.TPMSNVPublic) error {
	owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
	if err != nil {
		return err
	}
	_, err = tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}.Execute(b)
	return err
}

// withNV runs f with an NV index and what authorizes the owner for it.
func (s *Store) withNV(ctx context.Context, op string, index uint32, f func(b *bus, n *nv, owner tpm2.AuthHandle) error) error {
	return s.do(ctx, fmt.Sprintf("%s NV index 0x%08x", op, index), func(b *bus) error {
		n, err := b.readNVPublic(tpm2.TPMHandle(index))
		if err != nil {
			return err
		}
		owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
		if err != nil {
			return err
		}
		return f(b, n, owner)
	})
}

// WriteNV writes data to the beginning of an NV index, in pieces that the TPM takes, and reads it back (Part 3, 31.7).
func (s *Store) WriteNV(ctx context.Context, index uint32, data []byte) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	err := s.withNV(ctx, "writing", index, func(b *bus, n *nv, _ tpm2.AuthHandle) error {
		if len(data) > int(n.public.DataSize) {
			return fmt.Errorf("it has %d octets, too few for %d: %w", n.public.DataSize, len(data), hsm.ErrFull)
		}
		for at := 0; at < len(data); {
			piece := data[at:min(len(data), at+b.d.nvBuffer)]
			owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
			if err != nil {
				return err
			}
			if _, err := (tpm2.NVWrite{AuthHandle: owner, NVIndex: n, Data: tpm2.TPM2BMaxNVBuffer{Buffer: piece}, Offset: uint16(at)}).Execute(b); err != nil {
				return err
			}
			at += len(piece)
			if n, err = b.readNVPublic(n.Handle); err != nil { // its name has changed: it is written now
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	back, err := s.ReadNV(ctx, index)
	if err != nil {
		return err
	}
	if len(back) < len(data) || !bytes.Equal(back[:len(data)], data) {
		return fmt.Errorf("NV index 0x%08x reads back as something else than was written", index)
	}
	return nil
}

// LockNV locks an NV index against writing, until it is deleted (Part 3, 31.11).
func (s *Store) LockNV(ctx context.Context, index uint32) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	return s.withNV(ctx, "locking", index, func(b *bus, n *nv, owner tpm2.AuthHandle) error {
		if n.public.Attributes.WriteLocked {
			return nil
		}
		_, err := tpm2.NVWriteLock{AuthHandle: owner, NVIndex: n}.Execute(b)
		return err
	})
}

// DeleteNV deletes an NV index (Part 3, 31.4).
func (s *Store) DeleteNV(ctx context.Context, index uint32) error {
	if err := checkIndex(index); err != nil {
		return err
	}
	return s.withNV(ctx, "deleting", index, func(b *bus, n *nv, owner tpm2.AuthHandle) error {
		_, err := tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: n}.Execute(b)
		return err
	})
}

// ReadNV reads an NV index whole, without authorization where that is allowed and else as the owner. The error is
// hsm.ErrNotFound when there is none.
func (s *Store) ReadNV(ctx context.Context, index uint32) ([]byte, error) {
	var data []byte
	err := s.do(ctx, fmt.Sprintf("reading NV index 0x%08x", index), func(b *bus) (err error) {
		data, err = s.readNV(b, tpm2.TPMHandle(index))
		return err
	})
	return data, err
}

func (s *Store) readNV(b *bus, h tpm2.TPMHandle) ([]byte, error) {
	n, err := b.readNVPublic(h)
	if err != nil {
		return nil, err
	}
	var data []byte
	for size := int(n.public.DataSize); len(data) < size; {
		var auth tpm2.AuthHandle
		if n.public.Attributes.AuthRead {
			auth = tpm2.AuthHandle{Handle: n.Handle, Name: n.Name, Auth: tpm2.PasswordAuth(nil)}
		} else if auth, err = s.hierarchy(b, tpm2.TPMRHOwner); err != nil {
			return nil, err
		}
		rsp, err := tpm2.NVRead{AuthHandle: auth, NVIndex: n, Size: uint16(min(size-len(data), b.d.nvBuffer)), Offset: uint16(len(data))}.Execute(b)
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) == 0 || len(data)+len(rsp.Data.Buffer) > maxNV {
			return nil, errors.New("the TPM gives another amount than was asked for")
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return data, nil
}
