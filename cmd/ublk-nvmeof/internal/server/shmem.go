package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/ublk"
)

// The socket for the shared memory of a ublk device. A client connects, sends a memfd with any
// byte, and reads a line: "ok BYTES", or "error" and a reason. The memory is shared until the
// client hangs up. If the server hangs up first, the client connects again and sends the same
// memfd. One client at a time is served.

const (
	// shareTime is the time that a client has to send its memory.
	shareTime = 10 * time.Second
	// sharePatience is the time that the client of a dead server has to come back. Its requests
	// in flight wait until then, and fail afterwards.
	sharePatience = time.Minute
)

// sharer is the part of ublk.Device that has shared memory.
type sharer interface {
	Share(ctx context.Context, f *os.File, record func(ublk.SharedMemory) error) error
	Shared() (m ublk.SharedMemory, mapped bool)
	Unshare(ctx context.Context) error
	Done() <-chan struct{}
	Path() string
}

// sharingDevice is a ublk device with a socket for shared memory.
type sharingDevice struct {
	device
	socket *shareSocket
}

// Record implements device.
func (d sharingDevice) Record() state.Device {
	r := d.device.Record()
	r.Socket = d.socket.listener.Addr().String()
	if m, _ := d.socket.dev.Shared(); m != (ublk.SharedMemory{}) {
		r.Shared = &state.SharedMemory{Device: m.Device, Inode: m.Inode, Size: m.Size}
	}
	return r
}

// Accept implements device.
func (d sharingDevice) Accept() { d.socket.begin.Do(func() { go d.socket.accept() }) }

// HandOver implements device. The client comes back to the next server.
func (d sharingDevice) HandOver(ctx context.Context, sessions string) error {
	d.socket.end()
	return d.device.HandOver(ctx, sessions)
}

// shareSocket takes shared memory for a device.
type shareSocket struct {
	dev      sharer
	log      *slog.Logger
	listener *net.UnixListener
	record   func(*state.SharedMemory) error
	begin    sync.Once       // of accept
	life     context.Context // ends with the device, or when it is handed over
	end      func()
	taken    atomic.Bool // by a client that has its memory shared, or is about to
	busy     sync.Mutex  // held while memory is shared, also after its client has hung up
}

// sharing lets users of a device share their memory, if they may. path is where clients of a dead
// server look for the socket, or "".
func (s *server) sharing(nsid uint32, d device, path string) (device, error) {
	dev, ok := d.(sharer)
	if s.opts.ShmemSocket == "" || !ok {
		return d, nil
	}
	l, err := s.bind(path, s.opts.ShmemSocket, nsid, "--shmem-socket")
	if err != nil {
		return nil, fmt.Errorf("listen for shared memory: %w", err)
	}
	record := func(m *state.SharedMemory) error { return s.record.share(l.Addr().String(), m) }
	return sharingDevice{d, newShareSocket(dev, l, s.log.With("device", dev.Path()), record)}, nil
}

// newShareSocket takes shared memory at l once accept is called.
func newShareSocket(dev sharer, l *net.UnixListener, log *slog.Logger, record func(*state.SharedMemory) error) *shareSocket {
	life, cancel := context.WithCancel(context.Background())
	x := &shareSocket{dev: dev, log: log, listener: l, record: record, life: life}
	x.end = func() {
		cancel()
		_ = l.Close() // it may be closed
	}
	go func() {
		<-dev.Done()
		x.end()
	}()
	if m, _ := dev.Shared(); m != (ublk.SharedMemory{}) {
		go x.awaitOld()
	}
	return x
}

func (x *shareSocket) accept() {
	for {
		c, err := x.listener.AcceptUnix()
		if err != nil {
			if x.life.Err() == nil {
				x.log.Error("no more shared memory is taken", "error", err)
			}
			return
		}
		go x.serve(c)
	}
}

// serve shares the memory of a client until it hangs up.
func (x *shareSocket) serve(c *net.UnixConn) {
	defer c.Close()
	stop := context.AfterFunc(x.life, func() { _ = c.Close() })
	defer stop()
	f, err := receiveFile(c)
	if err != nil {
		x.refuse(c, err)
		return
	}
	defer f.Close()
	if !x.taken.CompareAndSwap(false, true) {
		x.refuse(c, errors.New("another client has its memory shared"))
		return
	}
	x.busy.Lock() // until the memory of the last client is not shared any more
	defer x.busy.Unlock()
	size, err := x.take(f)
	if err != nil {
		x.taken.Store(false) // before the answer, so that another client can follow at once
		x.refuse(c, err)
		return
	}
	_, _ = fmt.Fprintf(c, "ok %d\n", size) // a client that has gone shows below
	_, _ = io.Copy(io.Discard, c)
	x.taken.Store(false)
	if x.life.Err() == nil {
		x.unshare()
	}
}

func (x *shareSocket) refuse(c net.Conn, err error) {
	x.log.Warn("shared memory refused", "reason", err)
	_, _ = fmt.Fprintf(c, "error %v\n", err) // the client may have gone
}

// take shares memory.
func (x *shareSocket) take(f *os.File) (size int64, err error) {
	recorded := false
	err = x.dev.Share(x.life, f, func(m ublk.SharedMemory) error {
		recorded = true
		return x.record(&state.SharedMemory{Device: m.Device, Inode: m.Inode, Size: m.Size})
	})
	m, _ := x.dev.Shared()
	if err != nil && recorded && m == (ublk.SharedMemory{}) {
		err = errors.Join(err, x.record(nil))
	}
	return m.Size, err
}

// receiveFile receives one byte with one file descriptor.
func receiveFile(c *net.UnixConn) (*os.File, error) {
	if err := c.SetReadDeadline(time.Now().Add(shareTime)); err != nil {
		return nil, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, flags, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, fmt.Errorf("receive a memfd: %w", err)
	}
	var fds []int
	if all, err := unix.ParseSocketControlMessage(oob[:n]); err == nil && len(all) == 1 {
		fds, _ = unix.ParseUnixRights(&all[0]) // another message has none
	}
	if len(fds) != 1 || flags&unix.MSG_CTRUNC != 0 {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, errors.New("want one memfd, sent with one byte (SCM_RIGHTS)")
	}
	return os.NewFile(uintptr(fds[0]), "shared memory"), c.SetReadDeadline(time.Time{})
}

// unshare ends the use of shared memory.
func (x *shareSocket) unshare() {
	err := x.dev.Unshare(context.Background())
	if err == nil {
		err = x.record(nil)
	}
	if err != nil {
		x.log.Warn("shared memory stays shared", "error", err)
	}
}

// awaitOld gives the client of a dead server time to come back.
func (x *shareSocket) awaitOld() {
	select {
	case <-time.After(sharePatience):
	case <-x.life.Done():
		return
	}
	x.busy.Lock()
	defer x.busy.Unlock()
	if _, mapped := x.dev.Shared(); !mapped && x.life.Err() == nil {
		x.log.Warn("nobody has handed over the shared memory of the dead server")
		x.unshare()
	}
}
