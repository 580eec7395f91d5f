package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Types and states of requests.
const (
	In          = 0
	Out         = 1
	Flush       = 4
	GetID       = 8
	Discard     = 11
	WriteZeroes = 13

	OK          = 0
	IOErr       = 1
	Unsupported = 2
)

// Config configures NewGuest. Zero fields get defaults.
type Config struct {
	Rings    int    // 1
	RingSize int    // 128, a power of two
	Data     int    // bytes of the data of a request, 64 KiB
	Features uint64 // to negotiate, if they are offered; 0: all
	Ack      bool   // REPLY_ACK
	Slots    bool   // ADD_MEM_REG and not SET_MEM_TABLE
	NoTrack  bool   // no record of requests in flight
	Polled   bool   // no kicks
	Sealed   bool   // the memory cannot shrink
}

// Addresses of the guest's memory, as the guest and as the front end know it.
const (
	GuestBase = 0x1_0000_0000
	UserBase  = 0x7000_0000_0000
)

// Guest is a virtual machine: memory with rings, and buffers for requests. One goroutine
// uses it at a time, or one for each ring. Plug and Unplug may be called by yet another one,
// also while the guest connects again.
type Guest struct {
	cfg      Config
	Mem      []byte
	FD       int // memfd of Mem
	Rings    []*Ring
	Conn     *Conn // nil: not connected
	Offered  uint64
	Features uint64
	track    int // file of the record of requests in flight, or -1
	trackOf  []byte

	setup   sync.Mutex // guards what follows, and the connection while messages are sent
	modules []*Module  // plugged in
}

// Ring is a split ring with its requests. Request i has slot i, with its own buffers.
type Ring struct {
	guest             *Guest
	Index             int
	Num               uint16
	Desc, Avail, Used uint64 // offsets in Mem
	slots             uint64
	stride            uint64
	Kick, Call        int
	availIdx, usedIdx uint16
	free              []uint16
	readBuf           [8]byte
	kickBuf           [8]byte
}

const (
	slotHeader = 0    // 16 bytes
	slotStatus = 16   // 1 byte
	slotTable  = 64   // indirect table
	slotData   = 1024 // data

	// MaxBuffers is the largest number of buffers of PrepareList: the table also has those of the
	// header and the status.
	MaxBuffers = (slotData-slotTable)/16 - 2
)

// Buffer is a part of the guest's memory, by its guest address.
type Buffer struct {
	Addr   uint64
	Length uint32
}

// NewGuest makes a guest.
func NewGuest(cfg Config) (*Guest, error) {
	if cfg.Rings == 0 {
		cfg.Rings = 1
	}
	if cfg.RingSize == 0 {
		cfg.RingSize = 128
	}
	if cfg.Data == 0 {
		cfg.Data = 64 << 10
	}
	g := &Guest{cfg: cfg, track: -1}
	round := func(n uint64) uint64 { return (n + 4095) &^ 4095 }
	num := uint64(cfg.RingSize)
	rings := round(16*num) + round(6+2*num) + round(8+8*num)
	// Three descriptors for a request, or one that refers to a table.
	stride := round(slotData + uint64(cfg.Data))
	size := uint64(cfg.Rings) * (rings + num*stride)
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	g.FD = fd
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	if cfg.Sealed {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
			return nil, errors.Join(err, g.Close())
		}
	}
	if g.Mem, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	at := uint64(0)
	for i := range cfg.Rings {
		r := &Ring{guest: g, Index: i, Num: uint16(num), stride: stride, Kick: -1, Call: -1}
		r.Desc, r.Avail, r.Used = at, at+round(16*num), at+round(16*num)+round(6+2*num)
		r.slots = at + rings
		at += rings + num*stride
		binary.LittleEndian.PutUint64(r.kickBuf[:], 1)
		for _, p := range []*int{&r.Kick, &r.Call} {
			if *p, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
				return nil, errors.Join(err, g.Close())
			}
		}
		g.Rings = append(g.Rings, r)
	}
	g.Reset()
	return g, nil
}

// Reset makes all rings empty, as a driver does when it starts.
func (g *Guest) Reset() {
	for _, r := range g.Rings {
		r.Begin()
	}
	if g.track >= 0 {
		_ = unix.Close(g.track)
		g.track = -1
	}
}

// Begin makes the ring empty.
func (r *Ring) Begin() {
	clear(r.guest.Mem[r.Desc:r.slots])
	r.availIdx, r.usedIdx, r.free = 0, 0, r.free[:0]
	for i := int(r.Num)/3 - 1; i >= 0; i-- {
		r.free = append(r.free, uint16(i))
	}
}

// Close frees everything.
func (g *Guest) Close() error {
	var errs []error
	if g.Conn != nil {
		errs = append(errs, g.Conn.Close())
	}
	for _, r := range g.Rings {
		_ = unix.Close(r.Kick)
		_ = unix.Close(r.Call)
	}
	if g.track >= 0 {
		_ = unix.Close(g.track)
	}
	if g.Mem != nil {
		errs = append(errs, unix.Munmap(g.Mem))
	}
	return errors.Join(append(errs, unix.Close(g.FD))...)
}

// Connect negotiates in the order in which QEMU does, and starts the rings. After a loss of
// the connection it continues with the rings as they are.
func (g *Guest) Connect(path string) error {
	c, err := Dial(path)
	if err != nil {
		return err
	}
	return g.Attach(c)
}

// Attach is Connect over a connection.
func (g *Guest) Attach(c *Conn) error {
	g.setup.Lock()
	defer g.setup.Unlock()
	g.Conn = c
	var err error
	if g.Offered, err = c.AskU64(GetFeatures); err != nil {
		return err
	}
	proto, err := c.AskU64(GetProtocolFeatures)
	if err != nil {
		return err
	}
	if !g.cfg.Ack {
		proto &^= ProtoReplyAck
	}
	if err := c.Send(SetProtocolFeatures, U64(proto)); err != nil {
		return err
	}
	c.Ack = g.cfg.Ack
	if n, err := c.AskU64(GetQueueNum); err != nil || n < uint64(len(g.Rings)) {
		return fmt.Errorf("%d queues, want %d: %w", n, len(g.Rings), err)
	}
	if n, err := c.AskU64(GetMaxMemSlots); err != nil || n < 32 {
		return fmt.Errorf("%d memory slots: %w", n, err)
	}
	if err := c.Send(SetOwner, nil); err != nil {
		return err
	}
	features := g.Offered &^ FeatLogAll
	if g.cfg.Features != 0 {
		features &= g.cfg.Features | FeatProtocolFeatures | FeatVersion1
	}
	if g.Features != features { // rings in use read it
		g.Features = features
	}
	if !g.cfg.NoTrack {
		if err := g.setInflight(); err != nil {
			return err
		}
	}
	if err := c.Send(SetFeatures, U64(g.Features)); err != nil {
		return err
	}
	if err := g.SendMemory(); err != nil {
		return err
	}
	for _, r := range g.Rings {
		if err := r.Start(); err != nil {
			return err
		}
	}
	return nil
}

// Area returns the description of a part of the guest's memory.
func Area(offset, size uint64) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, GuestBase+offset)
	b = le.AppendUint64(b, size)
	b = le.AppendUint64(b, UserBase+offset)
	return le.AppendUint64(b, offset)
}

// Single is the payload of ADD_MEM_REG and REM_MEM_REG.
func Single(area []byte) []byte { return append(make([]byte, 8), area...) }

// Table is the payload of SET_MEM_TABLE.
func Table(areas ...[]byte) []byte {
	b := U64(uint64(len(areas)))
	for _, a := range areas {
		b = append(b, a...)
	}
	return b
}

// Halves returns the two regions of the memory, which meet in the middle of the data of a
// request.
func (g *Guest) Halves() (first, second []byte) {
	half := (g.Rings[0].slots + slotData + 4096) &^ 4095
	return Area(0, half), Area(half, uint64(len(g.Mem))-half)
}

// SendMemory passes the guest's memory to the back end.
func (g *Guest) SendMemory() error {
	first, second := g.Halves()
	areas, files := [][]byte{first, second}, []int{g.FD, g.FD}
	for _, m := range g.modules {
		areas, files = append(areas, m.area()), append(files, m.fd)
	}
	if !g.cfg.Slots {
		return g.Conn.Send(SetMemTable, Table(areas...), files...)
	}
	var errs []error
	for i, a := range areas {
		errs = append(errs, g.Conn.Send(AddMemReg, Single(a), files[i]))
	}
	return errors.Join(errs...)
}

// setInflight asks for a record of requests in flight, or gives back the one that it has.
func (g *Guest) setInflight() error {
	le := binary.LittleEndian
	if g.track < 0 {
		ask := make([]byte, 16)
		ask = le.AppendUint16(ask, uint16(len(g.Rings)))
		ask = le.AppendUint16(ask, g.Rings[0].Num)
		ask = append(ask, 0, 0, 0, 0) // QEMU does not pack the structure
		p, fds, err := g.Conn.Ask(GetInflightFD, ask)
		if err != nil {
			return err
		}
		if len(fds) != 1 || len(p) != len(ask) {
			return fmt.Errorf("reply to GET_INFLIGHT_FD has %d bytes and %d descriptors", len(p), len(fds))
		}
		g.track, g.trackOf = fds[0], p
	}
	return g.Conn.Send(SetInflightFD, g.trackOf, g.track)
}

// Inflight returns the mapped record of requests in flight, for a test to change.
func (g *Guest) Inflight() ([]byte, error) {
	return unix.Mmap(g.track, 0, int(binary.LittleEndian.Uint64(g.trackOf)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// Addr is the payload of SET_VRING_ADDR.
func (r *Ring) Addr(flags uint32) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, uint32(r.Index))
	b = le.AppendUint32(b, flags)
	for _, at := range []uint64{UserBase + r.Desc, UserBase + r.Used, UserBase + r.Avail, GuestBase + r.Used} {
		b = le.AppendUint64(b, at)
	}
	return b
}

// Start starts the ring. Its base is the index of the used ring, as QEMU has it after the
// back end has died.
func (r *Ring) Start() error {
	c := r.guest.Conn
	i := uint32(r.Index)
	kick := func() error { return c.Send(SetVringKick, U64(uint64(i)), r.Kick) }
	if r.guest.cfg.Polled {
		kick = func() error { return c.Send(SetVringKick, U64(uint64(i)|1<<8)) }
	}
	for _, step := range []func() error{
		func() error { return c.Send(SetVringNum, State(i, uint32(r.Num))) },
		func() error { return c.Send(SetVringBase, State(i, uint32(r.usedNow()))) },
		func() error { return c.Send(SetVringAddr, r.Addr(0)) },
		kick,
		func() error { return c.Send(SetVringCall, U64(uint64(i)), r.Call) },
		func() error { return c.Send(SetVringEnable, State(i, 1)) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("start ring %d: %w", i, err)
		}
	}
	return nil
}

// Stop stops the ring and returns its base.
func (r *Ring) Stop() (uint32, error) {
	p, _, err := r.guest.Conn.Ask(GetVringBase, State(uint32(r.Index), 0))
	if err != nil || len(p) != 8 {
		return 0, fmt.Errorf("stop ring %d: % x: %w", r.Index, p, err)
	}
	return binary.LittleEndian.Uint32(p[4:]), nil
}

// word returns a 32-bit word of the guest's memory.
func (g *Guest) word(at uint64) *uint32 { return (*uint32)(unsafe.Pointer(&g.Mem[at])) }

// usedNow returns the index of the used ring.
func (r *Ring) usedNow() uint16 { return uint16(atomic.LoadUint32(r.guest.word(r.Used)) >> 16) }

// SetAvail makes the available ring end at an index.
func (r *Ring) SetAvail(idx uint16) {
	r.availIdx = idx
	flags := atomic.LoadUint32(r.guest.word(r.Avail)) & 0xFFFF
	atomic.StoreUint32(r.guest.word(r.Avail), flags|uint32(idx)<<16)
}

// AvailIdx returns the index of the available ring.
func (r *Ring) AvailIdx() uint16 { return r.availIdx }

// SetDesc writes a descriptor.
func (r *Ring) SetDesc(i uint16, addr uint64, length uint32, flags, next uint16) {
	r.guest.PutDesc(r.Desc+16*uint64(i), addr, length, flags, next)
}

// PutDesc writes a descriptor at an offset of the memory.
func (g *Guest) PutDesc(at uint64, addr uint64, length uint32, flags, next uint16) {
	le := binary.LittleEndian
	p := g.Mem[at:]
	le.PutUint64(p, addr)
	le.PutUint32(p[8:], length)
	le.PutUint16(p[12:], flags)
	le.PutUint16(p[14:], next)
}

// Offer puts a descriptor into the available ring and kicks.
func (r *Ring) Offer(head uint16) {
	r.offer(head)
	r.Notify()
}

func (r *Ring) offer(head uint16) {
	at := r.Avail + 4 + 2*uint64(r.availIdx%r.Num)
	binary.LittleEndian.PutUint16(r.guest.Mem[at:], head)
	r.SetAvail(r.availIdx + 1)
}

// Notify kicks.
func (r *Ring) Notify() {
	if _, err := unix.Write(r.Kick, r.kickBuf[:]); err != nil {
		panic(err) // the eventfd belongs to the guest
	}
}

// notifyIfWanted kicks if the back end asks for it. was is the index of the available ring
// at the last kick.
func (r *Ring) notifyIfWanted(was uint16) {
	if r.guest.Features&FeatEventIdx != 0 {
		event := uint16(atomic.LoadUint32(r.guest.word(r.Used + 4 + 8*uint64(r.Num))))
		if r.availIdx-event-1 >= r.availIdx-was {
			return
		}
	} else if r.MustNotKick() {
		return
	}
	r.Notify()
}

// MustNotKick reports whether the back end has told a guest without event index not to kick.
func (r *Ring) MustNotKick() bool { return atomic.LoadUint32(r.guest.word(r.Used))&1 != 0 }

// Slot returns the offsets of the header and the data of a slot, for malformed requests.
func (r *Ring) Slot(i uint16) (header, data uint64) {
	at := r.slots + uint64(i)*r.stride
	return at + slotHeader, at + slotData
}

// Data returns the buffer of a slot.
func (r *Ring) Data(slot uint16) []byte {
	_, at := r.Slot(slot)
	return r.guest.Mem[at : at+uint64(r.guest.cfg.Data)]
}

// Memory returns the memory of a buffer.
func (r *Ring) Memory(b Buffer) []byte {
	return r.guest.Mem[b.Addr-GuestBase:][:b.Length:b.Length]
}

// Take returns a free slot.
func (r *Ring) Take() uint16 {
	slot := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	return slot
}

// Release frees a slot.
func (r *Ring) Release(slot uint16) { r.free = append(r.free, slot) }

// Free returns the number of free slots.
func (r *Ring) Free() int { return len(r.free) }

const (
	next     = 1
	write    = 2
	indirect = 4
)

// Prepare writes the descriptors of a request with n bytes of data. Data of a read goes to
// Data(slot), other data comes from there.
func (r *Ring) Prepare(slot uint16, kind uint32, sector uint64, n uint32) (head uint16) {
	_, data := r.Slot(slot)
	return r.PrepareAt(slot, kind, sector, GuestBase+data, n)
}

// PrepareAt is Prepare with data at another guest address.
func (r *Ring) PrepareAt(slot uint16, kind uint32, sector, data uint64, n uint32) (head uint16) {
	if n == 0 {
		return r.PrepareList(slot, kind, sector)
	}
	return r.PrepareList(slot, kind, sector, Buffer{data, n})
}

// PrepareList is Prepare with data in several buffers, up to MaxBuffers. Without FeatIndirect there is
// only room for one.
func (r *Ring) PrepareList(slot uint16, kind uint32, sector uint64, data ...Buffer) (head uint16) {
	g, le := r.guest, binary.LittleEndian
	header, _ := r.Slot(slot)
	le.PutUint32(g.Mem[header:], kind)
	le.PutUint32(g.Mem[header+4:], 0)
	le.PutUint64(g.Mem[header+8:], sector)
	g.Mem[header+slotStatus] = 0xFF
	head = 3 * slot
	table, first, room := r.Desc, head, 1
	if g.Features&FeatIndirect != 0 {
		table, first, room = header+slotTable, 0, MaxBuffers
	}
	if len(data) > room {
		panic("vhosttest: too many buffers")
	}
	put := func(i uint16, addr uint64, length uint32, flags, nx uint16) {
		g.PutDesc(table+16*uint64(i), addr, length, flags, nx)
	}
	i := first
	put(i, GuestBase+header, 16, next, i+1)
	i++
	for _, b := range data {
		flags := uint16(next)
		if kind == In || kind == GetID {
			flags |= write
		}
		put(i, b.Addr, b.Length, flags, i+1)
		i++
	}
	put(i, GuestBase+header+slotStatus, 1, write, 0)
	if g.Features&FeatIndirect != 0 {
		r.SetDesc(head, GuestBase+table, 16*uint32(i-first+1), indirect, 0)
	}
	return head
}

// Submit starts requests whose descriptors are prepared, all of them with one kick.
func (r *Ring) Submit(heads ...uint16) {
	was := r.availIdx
	for _, h := range heads {
		r.offer(h)
	}
	r.notifyIfWanted(was)
}

// Reap returns a completed request, if there is one.
func (r *Ring) Reap() (slot uint16, status byte, ok bool) {
	slot, status, _, ok = r.reap()
	return slot, status, ok
}

func (r *Ring) reap() (slot uint16, status byte, length uint32, ok bool) {
	if r.usedNow() == r.usedIdx {
		return 0, 0, 0, false
	}
	le := binary.LittleEndian
	e := r.guest.Mem[r.Used+4+8*uint64(r.usedIdx%r.Num):]
	r.usedIdx++
	slot = uint16(le.Uint32(e) / 3)
	header, _ := r.Slot(slot)
	return slot, r.guest.Mem[header+slotStatus], le.Uint32(e[4:]), true
}

// Wait waits for a completed request.
func (r *Ring) Wait() (slot uint16, status byte, err error) {
	for {
		slot, status, ok := r.Reap()
		if ok {
			return slot, status, nil
		}
		if err := r.AwaitCall(); err != nil {
			return 0, 0, err
		}
	}
}

// AwaitCall asks for a call and waits for it, or for a completed request.
func (r *Ring) AwaitCall() error {
	if r.guest.Features&FeatEventIdx != 0 {
		at := r.Avail + 4 + 2*uint64(r.Num)
		atomic.StoreUint32(r.guest.word(at), uint32(r.usedIdx)) // used_event; nothing follows it
	}
	if r.usedNow() != r.usedIdx {
		return nil
	}
	p := [1]unix.PollFd{{Fd: int32(r.Call), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p[:], int(patience.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("ring %d: no call within %v; used index %d, available index %d", r.Index, patience, r.usedIdx, r.availIdx)
		}
		_, err = unix.Read(r.Call, r.readBuf[:])
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		return err
	}
}

// Do executes a request and returns its status. Data of a read is in Data(slot) of the slot
// that the caller has taken.
func (r *Ring) Do(slot uint16, kind uint32, sector uint64, n uint32) (byte, error) {
	r.Submit(r.Prepare(slot, kind, sector, n))
	got, status, err := r.Wait()
	if err == nil && got != slot {
		err = fmt.Errorf("slot %d was completed, want %d", got, slot)
	}
	return status, err
}

// SetRecord makes the guest use a record of requests in flight of its own, although it was
// configured to have none.
func (g *Guest) SetRecord(fd int, desc []byte) {
	g.track, g.trackOf, g.cfg.NoTrack = fd, desc, false
}

// PutUsed does what a back end does to complete a request.
func (r *Ring) PutUsed(head uint16) {
	idx := r.usedNow()
	at := r.Used + 4 + 8*uint64(idx%r.Num)
	binary.LittleEndian.PutUint32(r.guest.Mem[at:], uint32(head))
	header, _ := r.Slot(head / 3)
	r.guest.Mem[header+slotStatus] = OK
	atomic.StoreUint32(r.guest.word(r.Used), uint32(idx+1)<<16)
}
