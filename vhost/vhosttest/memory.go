package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Module is a memory module: memory with a file of its own, which can be plugged into a guest that
// runs.
type Module struct {
	Mem  []byte
	Base uint64 // guest address
	fd   int
}

// moduleStep is the distance between the addresses of modules.
const moduleStep = 1 << 30

// NewModule makes the module for a slot, with huge pages or ordinary ones.
func NewModule(slot, size int, huge bool) (*Module, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge {
		flags |= unix.MFD_HUGETLB
	}
	fd, err := unix.MemfdCreate("module", flags)
	if err != nil {
		return nil, err
	}
	m := &Module{Base: GuestBase + uint64(slot+1)*moduleStep, fd: fd}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	if m.Mem, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Close frees the memory. The module must not be plugged in.
func (m *Module) Close() error {
	err := unix.Close(m.fd)
	if m.Mem != nil {
		err = errors.Join(err, unix.Munmap(m.Mem))
	}
	return err
}

// area is Area for a module.
func (m *Module) area() []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, m.Base)
	b = le.AppendUint64(b, uint64(len(m.Mem)))
	b = le.AppendUint64(b, m.Base-GuestBase+UserBase)
	return le.AppendUint64(b, 0)
}

// Plug adds a module to the guest. Without a connection, the back end learns of it at the next one.
func (g *Guest) Plug(m *Module) error {
	g.setup.Lock()
	defer g.setup.Unlock()
	g.modules = append(g.modules, m)
	switch {
	case g.Conn == nil:
		return nil
	case g.cfg.Slots:
		return g.Conn.Send(AddMemReg, Single(m.area()), m.fd)
	}
	return g.SendMemory()
}

// Unplug removes a module. With Config.Ack, the back end does not use it any more when Unplug
// returns.
func (g *Guest) Unplug(m *Module) error {
	g.setup.Lock()
	defer g.setup.Unlock()
	i := slices.Index(g.modules, m)
	if i < 0 {
		return fmt.Errorf("no module at %#x", m.Base)
	}
	g.modules = slices.Delete(g.modules, i, i+1)
	switch {
	case g.Conn == nil:
		return nil
	case g.cfg.Slots:
		return g.Conn.Send(RemMemReg, Single(m.area()), m.fd)
	}
	return g.SendMemory()
}

// Log is a log of written pages, as a front end has it for a migration.
type Log struct {
	bits []uint32
	raw  []byte
}

// StartLog gives the back end a log for all addresses of modules up to a slot, and switches the
// logging on, also that of writes to the rings.
func (g *Guest) StartLog(slot int) (*Log, error) {
	g.setup.Lock()
	defer g.setup.Unlock()
	size := (GuestBase + uint64(slot+2)*moduleStep) / 4096 / 8
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	raw, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	l := &Log{raw: raw, bits: unsafe.Slice((*uint32)(unsafe.Pointer(&raw[0])), size/4)}
	if _, _, err := g.Conn.Ask(SetLogBase, append(U64(size), U64(0)...), fd); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, g.logging(FeatLogAll, 1)
}

// StopLog switches the logging off.
func (g *Guest) StopLog() error {
	g.setup.Lock()
	defer g.setup.Unlock()
	return g.logging(0, 0)
}

func (g *Guest) logging(feature uint64, ringFlags uint32) error {
	errs := []error{g.Conn.Send(SetFeatures, U64(g.Features|feature))}
	for _, r := range g.Rings {
		errs = append(errs, g.Conn.Send(SetVringAddr, r.Addr(ringFlags)))
	}
	return errors.Join(errs...)
}

// Take returns the numbers of the pages that have been written since the last call, in order.
func (l *Log) Take() (pages []uint64) {
	for i := range l.bits {
		for w := atomic.SwapUint32(&l.bits[i], 0); w != 0; w &= w - 1 {
			pages = append(pages, uint64(32*i+bits.TrailingZeros32(w)))
		}
	}
	return pages
}

// Close frees the log.
func (l *Log) Close() error { return unix.Munmap(l.raw) }
