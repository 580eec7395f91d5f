package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// SharedMemory identifies the memory of a user of the device, from which it does I/O without a
// copy. The zero value is none.
type SharedMemory struct {
	Device, Inode uint64 // of its file
	Size          int64
}

// maxShared is the largest buffer that the driver registers. Its descriptors have 32 bits for the
// offset.
const maxShared = 4 << 30

// Errors of Device.Share
var (
	ErrShared   = errors.New("the device has other shared memory")
	ErrUnsealed = errors.New("the memory could change its size: its file is no memfd with the seals F_SEAL_SHRINK and F_SEAL_GROW")
)

// identify checks that a file is memory that can be shared, and identifies it.
func identify(f *os.File) (m SharedMemory, err error) {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return m, fmt.Errorf("stat the file: %w", err)
	}
	const want = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	unit := hostmem.FilePage(fd)
	switch {
	case err != nil || seals&want != want:
		return m, ErrUnsealed
	case seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0:
		return m, errors.New("the memory is sealed against writes, and reads write to it")
	case st.Size == 0 || st.Size%unit != 0:
		return m, fmt.Errorf("the memory has %d bytes, want a multiple of %d", st.Size, unit)
	case st.Size > maxShared:
		return m, fmt.Errorf("the memory has %d bytes, want up to %d", st.Size, int64(maxShared))
	}
	return SharedMemory{Device: st.Dev, Inode: st.Ino, Size: st.Size}, nil
}

// mapping is shared memory in this process.
type mapping struct {
	SharedMemory
	mem    []byte
	region block.Region
}

// open maps the memory and registers it with the back end.
func (m SharedMemory) open(f *os.File, back block.Registrar) (*mapping, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(m.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", m.Size, err)
	}
	fail := func(err error) (*mapping, error) { return nil, errors.Join(err, unix.Munmap(mem)) }
	if err := unix.Madvise(mem, unix.MADV_DONTFORK); err != nil {
		return fail(fmt.Errorf("keep %d bytes from children: %w", m.Size, err))
	}
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)
	if err := unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
		return fail(fmt.Errorf("populate %d bytes: %w", m.Size, err))
	}
	region, err := back.Register(mem)
	if err != nil {
		return fail(err)
	}
	return &mapping{m, mem, region}, nil
}

// close ends the registration with the back end, and unmaps the memory.
func (m *mapping) close() error {
	if err := m.region.Close(); err != nil {
		return err // it stays mapped
	}
	return unix.Munmap(m.mem)
}

// Share makes a memfd the shared memory of the device: I/O of users who have mapped it, with
// O_DIRECT and from contiguous memory, is not copied. The file has the seals F_SEAL_SHRINK and
// F_SEAL_GROW. The back end and for a remote disk its targets can then access all of it. A device
// has one shared memory at a time. After Recover it is the one that the dead server had, until
// Unshare. record, if it is not nil, is called before the driver knows the memory.
//
// Errors (errors.Is): ErrShared, ErrUnsealed, the cause of ctx, ErrStopped, and errors of record, of
// the back end and of the system. It needs Config.ShareMemory.
func (d *Device) Share(ctx context.Context, f *os.File, record func(SharedMemory) error) error {
	if err := d.share(ctx, f, record); err != nil {
		return fmt.Errorf("share memory with %s: %w", d.Path(), err)
	}
	return nil
}

func (d *Device) share(ctx context.Context, f *os.File, record func(SharedMemory) error) error {
	m, err := identify(f)
	if err != nil {
		return err
	}
	d.sharing.Lock()
	defer d.sharing.Unlock()
	switch {
	case d.registrar == nil:
		return fmt.Errorf("it was not started with shared memory: %w", errors.ErrUnsupported)
	case d.unshared:
		return ErrStopped
	case d.mapped != nil, d.shared != SharedMemory{} && d.shared != m:
		return ErrShared
	}
	if d.mapped, err = m.open(f, d.registrar); err != nil {
		return err
	}
	// The first request may come before the driver's answer.
	err = d.tellLoops(ctx, d.mapped.region.Number(), false)
	if err == nil && d.shared == (SharedMemory{}) {
		err = d.registerShared(ctx, record)
	}
	if err != nil {
		err = errors.Join(err, d.forget())
		return err
	}
	d.shared = m
	d.log.Info("memory is shared", "bytes", m.Size)
	return nil
}

// registerShared makes the mapped memory known to the driver.
func (d *Device) registerShared(ctx context.Context, record func(SharedMemory) error) error {
	if record != nil {
		if err := record(d.mapped.SharedMemory); err != nil {
			return err
		}
	}
	if d.shareCtl == nil {
		var err error
		if d.shareCtl, err = openControl(); err != nil {
			return err
		}
	}
	b := shmemBuf{addr: hostmem.Addr(d.mapped.mem), len: uint64(len(d.mapped.mem))}
	// The driver waits for the requests in flight. It cannot be told to give up.
	ctx = context.WithoutCancel(ctx)
	index, err := d.shareCtl.exec(ctx, call{cmd: regBuf, id: uint32(d.info.ID), buf: bytesOf(&b)})
	if err == nil && index != sharedIndex {
		err = errors.Join(fmt.Errorf("%v: the driver has buffers of somebody else", regBuf), d.shareCtl.do(ctx, call{cmd: unregBuf, id: uint32(d.info.ID), data: uint64(index)}))
	}
	return err
}

// sharedIndex is the number that the driver gives to the only buffer of a device.
const sharedIndex = 0

// Shared returns the shared memory of the device, and whether this process has it. It does not
// after Recover, until Share.
func (d *Device) Shared() (m SharedMemory, mapped bool) {
	d.sharing.Lock()
	defer d.sharing.Unlock()
	return d.shared, d.mapped != nil
}

// Unshare ends the use of shared memory, after the requests in flight. From then on its users'
// data is copied. Requests that wait for Share after Recover fail with EIO.
func (d *Device) Unshare(ctx context.Context) error {
	d.sharing.Lock()
	defer d.sharing.Unlock()
	if d.shared == (SharedMemory{}) || d.unshared {
		return nil
	}
	if err := d.unshare(ctx); err != nil {
		return fmt.Errorf("end shared memory of %s: %w", d.Path(), err)
	}
	return nil
}

func (d *Device) unshare(ctx context.Context) error {
	if d.mapped == nil { // the driver waits for all requests
		if err := d.tellLoops(ctx, 0, true); err != nil {
			return err
		}
	}
	if d.shareCtl == nil {
		var err error
		if d.shareCtl, err = openControl(); err != nil {
			return err
		}
	}
	// The driver waits for the requests in flight. It does not know the buffer if the dead server
	// had not come to register it.
	err := d.shareCtl.do(context.WithoutCancel(ctx), call{cmd: unregBuf, id: uint32(d.info.ID), data: sharedIndex})
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	d.shared = SharedMemory{}
	d.log.Info("memory is not shared any more")
	return d.forget()
}

// forget ends the use of the mapped memory, of which the driver does not know.
func (d *Device) forget() error {
	err := d.tellLoops(context.Background(), 0, false)
	if d.mapped == nil {
		return err
	}
	if err := d.mapped.close(); err != nil {
		return err
	}
	d.mapped = nil
	return err
}

// tellLoops tells the queues which region shared memory is, or that there is none. If refuse is
// true, requests with shared memory fail.
func (d *Device) tellLoops(ctx context.Context, region uint16, refuse bool) error {
	for i, s := range d.serves {
		err := onLoop(ctx, s.loop, func() error { s.share(region, refuse); return nil })
		if err != nil && !s.dead() {
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	return nil
}

// refuseShared fails the requests that wait for shared memory, because the device ends.
func (d *Device) refuseShared(ctx context.Context) error {
	if !d.sharing.TryLock() { // Share and Unshare do not leave such requests
		return nil
	}
	defer d.sharing.Unlock()
	if d.mapped != nil || d.shared == (SharedMemory{}) {
		return nil
	}
	return d.tellLoops(ctx, 0, true)
}

// endSharing frees shared memory when no queue is served any more. The driver forgets it with the
// device.
func (d *Device) endSharing() error {
	d.sharing.Lock()
	defer d.sharing.Unlock()
	d.unshared = true
	var errs []error
	if d.mapped != nil {
		if err := d.mapped.close(); err != nil {
			return err
		}
		d.mapped = nil
	}
	if d.shareCtl != nil {
		errs = append(errs, d.shareCtl.close())
		d.shareCtl = nil
	}
	return errors.Join(errs...)
}
