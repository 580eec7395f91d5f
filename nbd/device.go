package nbd

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/diskuse"
	"ublk-nvmeof/internal/frontend"
)

// Errors for errors.Is
var (
	// ErrNoDriver means that the kernel has no NBD client, because nbd is not loaded.
	ErrNoDriver = frontend.NewError(block.ErrNoDriver, "no NBD driver")
	// ErrPermission means that the process lacks CAP_SYS_ADMIN.
	ErrPermission = frontend.NewError(block.ErrPermission, "no permission to use NBD devices")
	// ErrTaken means that a device with this number is connected.
	ErrTaken = frontend.NewError(block.ErrTaken, "NBD device number is taken")
	// ErrNoDevice means that the device does not exist, is not connected, or has
	// another cookie.
	ErrNoDevice = frontend.NewError(block.ErrNoDevice, "no such NBD device")
	// ErrDisconnected means that another process disconnected the device.
	ErrDisconnected = frontend.NewError(block.ErrStopped, "NBD device was disconnected from outside")
)

const (
	// noTimeout is a timeout that never expires in practice. If none is set, the
	// kernel assumes after 30 seconds without a reply that the connection is dead,
	// and sends the request again on another.
	noTimeout = 30 * 24 * time.Hour
	// busyPatience is the time that Stop waits for a short-lived opener, such as
	// udev.
	busyPatience = 500 * time.Millisecond
	busyBackoff  = 20 * time.Millisecond
	// maxConnections fits into a netlink message of 64 KiB, and is larger than the
	// number of the kernel's queues.
	maxConnections = 1024
)

// DeviceConfig configures the device that Start makes.
type DeviceConfig struct {
	// Server serves the requests of the kernel. Required.
	Server *Server
	// Index is the number N of /dev/nbdN, or -1 for a free number of the kernel's
	// choice.
	Index int
	// Export is the name of the export of the server.
	Export string
	// Connections is the number of sockets between the kernel and the server,
	// 1..1024. Zero means one for each loop.
	Connections int
	// Timeout is the time that the kernel waits for a reply. Then it closes the
	// connection and sends the request again on another. Zero means no limit. It is
	// rounded up to seconds.
	Timeout time.Duration
	// DeadConn is the time that requests wait for a new connection after all
	// connections are lost, for example because this process has ended. Then they
	// fail. It is rounded up to seconds.
	DeadConn time.Duration
	// Log receives changes of state. If it is nil, the server's log is used.
	Log *slog.Logger
}

// Available returns nil if the kernel has an NBD client, ErrNoDriver if it has none, or
// the error that prevented it from finding out.
func Available() error {
	g, err := openKernel()
	if err != nil {
		return err
	}
	return g.close()
}

// Device is a /dev/nbdN that a Server serves. Its methods may be called from any
// goroutine except those of the loops.
type Device struct {
	srv    *Server
	cfg    DeviceConfig
	index  int
	cookie uint64
	log    *slog.Logger

	reconfiguring sync.Mutex // held during Reconfigure; taken before mu

	mu    sync.Mutex // guards the fields below
	offer offer      // its export does not change
	live  int        // number of connections and holds; see hold
	asked bool       // Stop was called
	ended bool       // done is closed, and no connection may be added

	done chan struct{} // closed when live is 0
	err  error         // why the device ended, or why the last connection did; written before done is closed
}

// Start makes the kernel serve an export as a block device. It needs CAP_SYS_ADMIN.
//
// Errors (errors.Is): ErrNoDriver, ErrPermission, ErrTaken, the cause of ctx, and errors
// of the system.
func Start(ctx context.Context, cfg DeviceConfig) (*Device, error) {
	s := cfg.Server
	if s == nil {
		return nil, errors.New("start NBD device: no server")
	}
	e := s.find(cfg.Export)
	if e == nil {
		return nil, fmt.Errorf("start NBD device: no export %q", cfg.Export)
	}
	switch {
	case cfg.Connections < 0 || cfg.Connections > maxConnections:
		return nil, fmt.Errorf("start NBD device: %d connections are not in 1..%d", cfg.Connections, maxConnections)
	case cfg.Timeout < 0 || cfg.DeadConn < 0:
		return nil, fmt.Errorf("start NBD device: timeout %v or %v is negative", cfg.Timeout, cfg.DeadConn)
	case cfg.Connections == 0:
		cfg.Connections = len(s.loops)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = noTimeout
	}
	if cfg.Log == nil {
		cfg.Log = s.cfg.Log
	}
	d := &Device{srv: s, cfg: cfg, offer: e.offer(false), cookie: newCookie(), done: make(chan struct{})}
	if err := d.start(ctx); err != nil {
		return nil, fmt.Errorf("start NBD device: %w", err)
	}
	d.log = cfg.Log.With("device", d.Path())
	if err := d.limit(); err != nil {
		d.log.Warn("the kernel's requests are not limited: a read that fails may cost the connection", "error", err)
	}
	d.log.Info("NBD device started", "connections", cfg.Connections)
	go d.watch()
	return d, nil
}

// newCookie returns a random number that distinguishes the device from later ones with
// the same index.
func newCookie() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return binary.NativeEndian.Uint64(b[:])
}

// backend is the identifier that the kernel stores with the device.
func backend(cookie uint64) string { return fmt.Sprintf("ublk-nvmeof-%016x", cookie) }

func (d *Device) start(ctx context.Context) error {
	// The kernel must send flushes even if the device has no volatile cache now,
	// because it may have one later.
	var attrs attributes
	if d.cfg.Index >= 0 {
		attrs = attrs.u32(attrIndex, uint32(d.cfg.Index))
	}
	attrs = attrs.u64(attrSize, d.offer.size).u64(attrBlockSize, uint64(d.offer.minBlock)).
		u64(attrTimeout, wholeSeconds(d.cfg.Timeout)).u64(attrDeadConn, wholeSeconds(d.cfg.DeadConn)).
		u64(attrServerFlags, uint64(d.offer.flags)).text(attrBackend, backend(d.cookie))
	answer, err := d.connect(ctx, nlConnect, attrs, d.cfg.Connections)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: /dev/nbd%d: %w", ErrTaken, d.cfg.Index, err)
	case err != nil:
		return err
	}
	index := answer.find(attrIndex)
	if len(index) != 4 {
		return errors.New("the kernel does not say which device it is")
	}
	d.index = int(binary.NativeEndian.Uint32(index))
	return nil
}

// limit lowers the kernel's largest request to the size for which a connection can hold
// all tags at once. Larger requests work, too, but the only way to report an error in the
// middle of a large read would be to close the connection. The netlink interface has no
// attribute for this limit, so it is set in sysfs.
func (d *Device) limit() error {
	e := d.offer.export
	path := filepath.Join("/sys/block", disk(d.index), "queue/max_sectors_kb")
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	have, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	want := uint64(e.atOnce() >> 10)
	if have <= want {
		return nil
	}
	// The kernel accepts no limit below a page.
	want = max(want, uint64(os.Getpagesize()>>10))
	return os.WriteFile(path, []byte(strconv.FormatUint(want, 10)), 0)
}

// connect passes n new connections to the kernel with a command, and serves them.
func (d *Device) connect(ctx context.Context, cmd uint8, attrs attributes, n int) (attributes, error) {
	// The first connection may end at once. The hold prevents the device from ending
	// with it.
	if err := d.hold(); err != nil {
		return nil, err
	}
	defer d.drop(nil)
	var theirs []int
	defer func() {
		for _, fd := range theirs {
			_ = unix.Close(fd) // the kernel has the socket, or does not want it
		}
	}()
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("make socket pair: %w", err)
		}
		theirs = append(theirs, fds[1])
		if err := d.serve(fds[0]); err != nil {
			return nil, err
		}
	}
	// The descriptors must stay open until the kernel has looked them up.
	return kernelDo(context.WithoutCancel(ctx), cmd, attrs.sockets(theirs))
}

// serve starts a connection.
func (d *Device) serve(fd int) error {
	s := d.srv
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return errors.Join(ErrStopped, unix.Close(fd))
	}
	s.ending.Add(1)
	s.mu.Unlock()
	d.mu.Lock()
	d.live++ // the caller has a hold
	o := d.offer
	d.mu.Unlock()
	go func() {
		defer s.ending.Done()
		d.drop(s.transmit(nil, fd, o, 0))
	}()
	return nil
}

// hold keeps the device from ending until drop. It fails if the device has ended.
func (d *Device) hold() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return errors.Join(ErrNoDevice, d.err)
	}
	d.live++
	return nil
}

// drop releases a hold or the place of a connection that has ended with err. The device
// ends with the last of them.
func (d *Device) drop(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.err = err
	}
	if d.live--; d.live > 0 {
		return
	}
	if d.asked {
		d.err = nil
	} else {
		d.err = errors.Join(ErrDisconnected, d.err)
	}
	d.ended = true
	close(d.done)
}

func (d *Device) watch() {
	<-d.done
	if d.err != nil {
		d.log.Error("NBD device ended", "error", d.err)
		return
	}
	d.log.Info("NBD device stopped")
}

// Reconfigure replaces lost connections and changes the timeouts, whose zero values mean
// the same as in DeviceConfig. A device that has lost all connections has ended for good:
// the error is ErrNoDevice.
func (d *Device) Reconfigure(ctx context.Context, timeout, deadConn time.Duration) error {
	if timeout == 0 {
		timeout = noTimeout
	}
	d.reconfiguring.Lock()
	defer d.reconfiguring.Unlock()
	d.mu.Lock()
	missing := max(0, d.cfg.Connections-d.live)
	d.mu.Unlock()
	attrs := attributes(nil).u32(attrIndex, uint32(d.index)).text(attrBackend, backend(d.cookie)).
		u64(attrTimeout, wholeSeconds(timeout)).u64(attrDeadConn, wholeSeconds(deadConn))
	if _, err := d.connect(ctx, nlReconfigure, attrs, missing); err != nil {
		return fmt.Errorf("reconfigure %s: %w", d.Path(), err)
	}
	d.log.Info("NBD device reconfigured", "new_connections", missing)
	return nil
}

// Resize sets the size of the device in bytes, after its export has changed its size.
// Errors are those of the kernel and the cause of ctx.
func (d *Device) Resize(ctx context.Context, size uint64) error {
	e := d.offer.export
	// The connections must know the new size first, because the kernel may use it at
	// once.
	d.mu.Lock()
	d.offer.size = size // for later connections
	d.mu.Unlock()
	d.srv.onConns(e, func(c *conn) { c.offer.size = size })
	attrs := attributes(nil).u32(attrIndex, uint32(d.index)).text(attrBackend, backend(d.cookie)).
		u64(attrSize, size).u64(attrBlockSize, uint64(d.offer.minBlock))
	if _, err := kernelDo(ctx, nlReconfigure, attrs); err != nil {
		return fmt.Errorf("resize %s: %w", d.Path(), err)
	}
	return nil
}

// Stop ends the device. When it returns, requests in flight are done, the block device
// has no size, and its number is free.
//
// Without force, Stop of a device in use changes nothing and returns ErrBusy. With
// force, users get I/O errors, and the number is free when the last user has closed the
// block device. When ctx is done, Stop returns an error and may be called again. Stop of
// a device that has ended returns nil.
func (d *Device) Stop(ctx context.Context, force bool) error {
	d.mu.Lock()
	asked := d.asked
	d.asked = true
	d.mu.Unlock()
	err := Disconnect(ctx, d.index, d.cookie, force)
	if errors.Is(err, ErrBusy) {
		d.mu.Lock()
		d.asked = asked
		d.mu.Unlock()
	}
	if err != nil && !errors.Is(err, ErrNoDevice) {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop %s: wait for requests in flight: %w", d.Path(), context.Cause(ctx))
	}
}

// Index returns the number N of /dev/nbdN.
func (d *Device) Index() int { return d.index }

// Cookie returns a number that distinguishes the device from earlier and later ones with
// the same index.
func (d *Device) Cookie() uint64 { return d.cookie }

// Path returns the path of the block device, /dev/nbdN.
func (d *Device) Path() string { return "/dev/" + disk(d.index) }

// Done returns a channel that is closed when no connection is left.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why the device ended: nil after Stop, otherwise ErrDisconnected. It returns
// nil until Done is closed.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// InUse returns ErrBusy if the block device has a user. See internal/diskuse for the
// users that it cannot see.
func (d *Device) InUse() error {
	fd, err := claim(context.Background(), d.index)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func disk(index int) string { return "nbd" + strconv.Itoa(index) }

// claim is like diskuse.Claim, but waits for busyPatience for users that are about to
// close the device.
func claim(ctx context.Context, index int) (int, error) {
	patience := time.After(busyPatience)
	for {
		fd, err := diskuse.Claim(disk(index))
		var used *diskuse.Error
		if !errors.As(err, &used) {
			return fd, err
		}
		select {
		case <-time.After(busyBackoff):
			continue
		case <-patience:
		case <-ctx.Done():
		}
		return -1, fmt.Errorf("%w: %s", ErrBusy, used.User)
	}
}

// Connected reports whether /dev/nbdN is still the device that was started with this
// cookie. The server of the device need not be alive.
func Connected(index int, cookie uint64) (bool, error) {
	text, err := os.ReadFile("/sys/block/" + disk(index) + "/backend")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // the file exists only while the device is connected
	}
	if err != nil {
		return false, fmt.Errorf("look for %s: %w", disk(index), err)
	}
	return strings.TrimSpace(string(text)) == backend(cookie), nil
}

// Disconnect ends a device that this process or an earlier one has started. It returns
// ErrNoDevice if /dev/nbdN is not the device with this cookie. For force see Device.Stop.
func Disconnect(ctx context.Context, index int, cookie uint64, force bool) error {
	if err := disconnect(ctx, index, cookie, force); err != nil {
		return fmt.Errorf("disconnect /dev/%s: %w", disk(index), err)
	}
	return nil
}

func disconnect(ctx context.Context, index int, cookie uint64, force bool) error {
	switch there, err := Connected(index, cookie); {
	case err != nil:
		return err
	case !there:
		return ErrNoDevice
	}
	if !force {
		fd, err := claim(ctx, index)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	_, err := kernelDo(ctx, nlDisconnect, attributes(nil).u32(attrIndex, uint32(index)))
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: %w", ErrNoDevice, err)
	}
	return err
}
