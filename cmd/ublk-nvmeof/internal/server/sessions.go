package server

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/rundir"
	"ublk-nvmeof/vhost"
)

// sessions receives the sessions of vhost-user-blk front ends from the server that this one
// replaces, on a socket in the directory of the record.
type sessions struct {
	log      *slog.Logger
	listener *net.UnixListener // nil: no session comes
	from     int               // process id of the other server
	ended    chan struct{}     // closed when no more sessions are accepted

	mu        sync.Mutex
	received  map[string]*vhost.Session // by the path of their sockets
	receiving sync.WaitGroup
}

// receiveSessions listens for the sessions of the server with a record, if it has any. end must
// follow. If it cannot listen, the front ends connect again.
func receiveSessions(r state.Record, log *slog.Logger) *sessions {
	x := &sessions{log: log, from: r.Process.PID, ended: make(chan struct{}), received: map[string]*vhost.Session{}}
	if !slices.ContainsFunc(r.Devices, func(d state.Device) bool { return d.Kind == state.VhostUserBlk }) {
		return x
	}
	l, err := listenAgain(filepath.Join(filepath.Dir(r.Socket()), "handover"))
	if err != nil {
		log.Warn("cannot receive sessions of front ends, which connect again", "error", err)
		return x
	}
	x.listener = l.(*net.UnixListener)
	go x.accept()
	return x
}

// listenAgain listens at a path at which a server that died may have listened.
func listenAgain(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return rundir.Listen(path)
}

// path returns the path of the socket, or "" if there is none.
func (x *sessions) path() string {
	if x.listener == nil {
		return ""
	}
	return x.listener.Addr().String()
}

// accept receives sessions until this process itself connects.
func (x *sessions) accept() {
	defer close(x.ended)
	for {
		c, err := x.listener.AcceptUnix()
		if err != nil {
			x.log.Error("cannot receive sessions of front ends, which connect again", "error", err)
			return
		}
		switch pid := peerOf(c); pid {
		case x.from:
			x.receiving.Go(func() { x.receive(c) })
			continue
		case os.Getpid():
			_ = c.Close()
			return
		default:
			x.log.Warn("another process than the server that is replaced offers a session", "process", pid)
			_ = c.Close()
		}
	}
}

func (x *sessions) receive(c *net.UnixConn) {
	defer c.Close()
	got, err := vhost.Receive(c)
	if err != nil {
		x.log.Warn("a front end was not handed over; it connects again", "error", err)
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.received[got.Socket()] = got
}

// end returns the sessions when the other server has ended. Connections that it has made are
// accepted before that of this process.
func (x *sessions) end() map[string]*vhost.Session {
	if x.listener == nil {
		return nil
	}
	c, err := net.DialUnix("unix", nil, x.listener.Addr().(*net.UnixAddr))
	if err != nil {
		x.log.Warn("cannot wait for the last sessions of front ends", "error", err)
	} else {
		<-x.ended
		_ = c.Close()
	}
	_ = x.listener.Close() // after an error the next server removes the socket
	x.receiving.Wait()
	return x.received
}

// peerOf returns the process at the other end, or 0 if it is not known.
func peerOf(c *net.UnixConn) int {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) { // an error leaves 0
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
