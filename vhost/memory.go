package vhost

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// region is a part of the guest's memory, mapped into this process.
type region struct {
	area
	mem  []byte       // the mapping from the region's first byte; size bytes
	raw  []byte       // the whole mapping
	file int          // what is mapped, for the next server
	lent block.Region // mem, if the back end has registered it; nil: its data is copied
}

// mapRegion maps a region of a file. It checks that the file has all bytes of it now. The
// front end can truncate the file later: see fault.
func mapRegion(a area, fd int) (*region, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat the file: %w", err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("the file is not a memfd or another regular file")
	case a.offset+a.size > uint64(st.Size):
		return nil, fmt.Errorf("%d bytes from offset %d are beyond the end of the file, which has %d bytes", a.size, a.offset, st.Size)
	}
	file, err := duplicate(fd)
	if err != nil {
		return nil, err
	}
	unit := uint64(hostmem.FilePage(fd))
	start := a.offset &^ (unit - 1)
	length := (a.offset + a.size - start + unit - 1) &^ (unit - 1)
	raw, err := unix.Mmap(fd, int64(start), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map %d bytes: %w", length, err), unix.Close(file))
	}
	// A core dump of this process is no place for the guest's memory, and neither is a child.
	_ = unix.Madvise(raw, unix.MADV_DONTDUMP)
	_ = unix.Madvise(raw, unix.MADV_DONTFORK)
	from := a.offset - start
	return &region{area: a, raw: raw, mem: raw[from : from+a.size : from+a.size], file: file}, nil
}

// duplicate returns another descriptor of a file that a message has brought.
func duplicate(fd int) (int, error) {
	file, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("keep the file: %w", err)
	}
	return file, nil
}

// lend registers a region with the back end. Its file must not be able to shrink, because the back
// end does not expect that. All pages are allocated now, for the same reason.
func (r *region) lend(back block.Registrar, fd int) error {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	switch {
	case err != nil:
		return errors.New("its file has no seals, so it could be truncated")
	case seals&unix.F_SEAL_SHRINK == 0:
		return errors.New("its file lacks the seal F_SEAL_SHRINK, so it could be truncated")
	}
	if err := unix.Madvise(r.raw, unix.MADV_POPULATE_WRITE); err != nil {
		return fmt.Errorf("populate: %w", err)
	}
	r.lent, err = back.Register(r.mem)
	return err
}

// takeBack ends the registration of a region. Nothing accesses it then except by its mapping.
func (r *region) takeBack() error {
	if r.lent == nil {
		return nil
	}
	if err := r.lent.Close(); err != nil {
		return fmt.Errorf("guest memory at %#x: %w", r.guest, err)
	}
	r.lent = nil
	return nil
}

// maxArea keeps sums of addresses and sizes far from an overflow.
const maxArea = 1 << 62

func (a area) check() error {
	switch {
	case a.size == 0:
		return errors.New("the region is empty")
	case a.size > maxArea || a.guest > maxArea || a.offset > maxArea:
		return fmt.Errorf("guest address %#x, size %#x or offset %#x is too large", a.guest, a.size, a.offset)
	case (a.guest|a.user|a.offset|a.size)&3 != 0:
		return fmt.Errorf("guest address %#x, user address %#x, size %#x or offset %#x is no multiple of 4", a.guest, a.user, a.size, a.offset)
	}
	return nil
}

func (r *region) unmap() error {
	if err := errors.Join(unix.Munmap(r.raw), unix.Close(r.file)); err != nil {
		return fmt.Errorf("unmap guest memory at %#x: %w", r.guest, err)
	}
	return nil
}

// memory is the memory of a guest. It does not change. Loops get another one when the
// front end adds or removes a region.
type memory struct {
	regions []*region // in the order of their guest addresses, without overlap
	log     *dirtyLog // nil: writes are not logged
}

// newMemory returns the memory with these regions.
func newMemory(regions []*region, log *dirtyLog) (*memory, error) {
	if len(regions) > maxSlots {
		return nil, fmt.Errorf("%d memory regions, want up to %d", len(regions), maxSlots)
	}
	m := &memory{regions: slices.Clone(regions), log: log}
	slices.SortFunc(m.regions, func(a, b *region) int { return cmp.Compare(a.guest, b.guest) })
	for i := 1; i < len(m.regions); i++ {
		a, b := m.regions[i-1], m.regions[i]
		if a.guest+a.size > b.guest {
			return nil, fmt.Errorf("memory regions at %#x and %#x overlap", a.guest, b.guest)
		}
	}
	return m, nil
}

// find returns the region that contains a guest address, or nil.
func (m *memory) find(guest uint64) *region {
	if len(m.regions) <= 8 {
		for _, r := range m.regions {
			if guest-r.guest < r.size {
				return r
			}
		}
		return nil
	}
	lo, hi := 0, len(m.regions)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if r := m.regions[mid]; guest >= r.guest+r.size {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(m.regions) && guest-m.regions[lo].guest < m.regions[lo].size {
		return m.regions[lo]
	}
	return nil
}

// at returns the memory from a guest address on: n bytes, or as many as the region has.
// It is empty if no region contains the address.
func (m *memory) at(guest uint64, n uint32) []byte {
	r := m.find(guest)
	if r == nil {
		return nil
	}
	off := guest - r.guest
	return r.mem[off : off+min(uint64(n), r.size-off)]
}

// has reports whether all bytes of a guest buffer are memory. Adjacent regions may share
// a buffer.
func (m *memory) has(s segment) bool {
	for s.length > 0 {
		n := uint32(len(m.at(s.guest, s.length)))
		if n == 0 || s.guest+uint64(n) < s.guest {
			return false
		}
		s.guest += uint64(n)
		s.length -= n
	}
	return true
}

// user returns n bytes at an address of the front end. They are within one region.
func (m *memory) user(addr, n uint64) []byte {
	for _, r := range m.regions {
		if off := addr - r.area.user; off < r.size && n <= r.size-off {
			return r.mem[off : off+n : off+n]
		}
	}
	return nil
}

// segment is a part of a guest's buffer.
type segment struct {
	guest  uint64
	length uint32
}

// copyIn copies from guest memory to dst, which has at most s.length bytes. It returns
// false if a region is missing.
func (m *memory) copyIn(dst []byte, guest uint64) bool {
	for len(dst) > 0 {
		n := copy(dst, m.at(guest, uint32(len(dst))))
		if n == 0 {
			return false
		}
		dst, guest = dst[n:], guest+uint64(n)
	}
	return true
}

// copyOut copies to guest memory, and logs the pages. It returns false if a region is
// missing.
func (m *memory) copyOut(guest uint64, src []byte) bool {
	for len(src) > 0 {
		n := copy(m.at(guest, uint32(len(src))), src)
		if n == 0 {
			return false
		}
		if m.log != nil {
			m.log.mark(guest, uint64(n))
		}
		src, guest = src[n:], guest+uint64(n)
	}
	return true
}

// word returns the aligned 32-bit word that contains the byte at off of b. Mappings are
// aligned to pages, so it is within the same mapping.
func word(b []byte, off uint64) *uint32 {
	p := unsafe.Pointer(&b[off])
	return (*uint32)(unsafe.Add(p, -int(uintptr(p)&3)))
}

// aligned reports whether the byte at off is the first of its word.
func aligned(b []byte, off uint64) bool {
	return uintptr(unsafe.Pointer(&b[off]))&3 == 0
}
