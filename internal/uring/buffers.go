package uring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BufRing is a group of small buffers of one size. The kernel takes one of them for each
// completion of a command with BufferSelect. A BufRing lives as long as its Ring and must
// be used from the same goroutine.
type BufRing struct {
	bufs []buf
	data []byte
	size int
	tail uint16
}

// RegisterBufRing makes a buffer group of entries buffers of size bytes, and passes all
// of them to the kernel. entries must be a power of two up to 32768.
func (r *Ring) RegisterBufRing(group uint16, entries, size int) (*BufRing, error) {
	if entries < 1 || entries > 1<<15 || bits.OnesCount(uint(entries)) != 1 || size < 1 {
		return nil, fmt.Errorf("register io_uring buffers: %w: %d of %d bytes", unix.EINVAL, entries, size)
	}
	head := entries * int(unsafe.Sizeof(buf{}))
	mem, err := r.mmap("buffers", -1, 0, head+entries*size)
	if err != nil {
		return nil, err
	}
	reg := bufReg{ringAddr: uint64(uintptr(unsafe.Pointer(&mem[0]))), ringEntries: uint32(entries), bgid: group}
	if _, err := r.register(registerPbufRing, unsafe.Pointer(&reg), 1); err != nil {
		return nil, fmt.Errorf("register io_uring buffers: %w", err)
	}
	b := &BufRing{bufs: unsafe.Slice((*buf)(unsafe.Pointer(&mem[0])), entries), data: mem[head:], size: size}
	for id := range entries {
		b.Recycle(uint16(id))
	}
	return b, nil
}

// Bytes returns the buffer with an id.
func (b *BufRing) Bytes(id uint16) []byte {
	off := int(id) * b.size
	return b.data[off : off+b.size : off+b.size]
}

// Recycle returns a buffer to the kernel.
func (b *BufRing) Recycle(id uint16) {
	e := &b.bufs[int(b.tail)&(len(b.bufs)-1)]
	e.addr = uint64(uintptr(unsafe.Pointer(&b.data[int(id)*b.size])))
	e.len = uint32(b.size)
	e.bid = id
	b.tail++
	// The ring's tail is a 16-bit field of the first entry. It shares an aligned word
	// with that entry's id, which the kernel only reads.
	var w [4]byte
	binary.NativeEndian.PutUint16(w[:], b.bufs[0].bid)
	binary.NativeEndian.PutUint16(w[2:], b.tail)
	(*atomic.Uint32)(unsafe.Pointer(&b.bufs[0].bid)).Store(binary.NativeEndian.Uint32(w[:]))
}

// fixedFiles is the ring's table of registered files.
type fixedFiles struct {
	used []bool
}

// maxFixedFiles is the size of the table.
const maxFixedFiles = 64

// ErrNoFixedFile means that all slots for fixed files are in use.
var ErrNoFixedFile = errors.New("no free slot for a fixed file")

// FixFile registers a file and returns the index to use with the FixedFile flag. Commands
// with this flag save the look-up of the descriptor and its reference count. The ring
// keeps the file open until UnfixFile or Close.
func (r *Ring) FixFile(fd int) (int, error) {
	if r.fixed.used == nil {
		reg := rsrcRegister{nr: maxFixedFiles, flags: registerFilesSparse}
		if _, err := r.register(registerFiles2, unsafe.Pointer(&reg), unsafe.Sizeof(reg)); err != nil {
			return 0, fmt.Errorf("register file table: %w", err)
		}
		r.fixed.used = make([]bool, maxFixedFiles)
	}
	for i, used := range r.fixed.used {
		if !used {
			if err := r.updateFile(i, int32(fd)); err != nil {
				return 0, fmt.Errorf("register file: %w", err)
			}
			r.fixed.used[i] = true
			return i, nil
		}
	}
	return 0, ErrNoFixedFile
}

// UnfixFile releases an index of FixFile. Pending commands keep the file open until they
// complete.
func (r *Ring) UnfixFile(index int) error {
	if err := r.updateFile(index, removedFD); err != nil {
		return fmt.Errorf("unregister file: %w", err)
	}
	r.fixed.used[index] = false
	return nil
}

func (r *Ring) updateFile(index int, fd int32) error {
	r.arg.fd = fd
	u := rsrcUpdate{offset: uint32(index), data: uint64(uintptr(unsafe.Pointer(&r.arg.fd)))}
	_, err := r.register(registerFilesUpdate, unsafe.Pointer(&u), 1)
	return err
}
