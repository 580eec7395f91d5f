package vhost

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// connPair returns a connection of two servers.
func connPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []**net.UnixConn{&a, &b} {
		if *c, err = unixConn(fds[i]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*c).Close() })
	}
	return a, b
}

// handOver moves the session of a server to another one.
func handOver(t testing.TB, from, to *served) {
	t.Helper()
	a, b := connPair(t)
	type received struct {
		session *Session
		err     error
	}
	got := make(chan received, 1)
	go func() {
		x, err := Receive(b)
		got <- received{x, err}
	}()
	if err := from.HandOver(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	if r.session.Socket() == "" {
		t.Error("the session has no socket")
	}
	to.Resume(r.session)
}

// TestHandOverSession moves a front end from server to server while it writes and reads. It stays
// connected, and no request is lost.
func TestHandOverSession(t *testing.T) {
	const servers = 4
	for name, cfg := range configs {
		t.Run(name, func(t *testing.T) {
			disk := newRAM(t, block.Geometry{})
			var all []*served
			for range servers {
				all = append(all, newServer(t, Config{Device: disk}))
			}
			g := connect(t, all[0], cfg)
			var stop atomic.Bool
			var guests sync.WaitGroup
			var rounds atomic.Int64
			for i, r := range g.Rings {
				guests.Go(func() {
					for n := byte(1); !stop.Load(); n++ {
						if err := writeAndRead(r, uint64(i), n); err != nil {
							t.Errorf("ring %d: %v", i, err)
							return
						}
						rounds.Add(1)
					}
				})
			}
			for i := range servers - 1 {
				for was := rounds.Load(); rounds.Load() < was+20 && !t.Failed(); time.Sleep(time.Millisecond) {
				}
				handOver(t, all[i], all[i+1])
			}
			for was := rounds.Load(); rounds.Load() < was+20 && !t.Failed(); time.Sleep(time.Millisecond) {
			}
			stop.Store(true)
			guests.Wait()
			if front := all[servers-1].Front(); front == "" {
				t.Error("the last server has no front end")
			}
		})
	}
}

// writeAndRead writes a block of n, and reads it.
func writeAndRead(r *vhosttest.Ring, sector uint64, n byte) error {
	want := bytes.Repeat([]byte{n}, 512)
	copy(r.Data(0), want)
	if status, err := r.Do(0, vhosttest.Out, sector, 512); err != nil || status != vhosttest.OK {
		return fmt.Errorf("write: status %d, %w", status, err)
	}
	clear(r.Data(0)[:512])
	if status, err := r.Do(0, vhosttest.In, sector, 512); err != nil || status != vhosttest.OK {
		return fmt.Errorf("read: status %d, %w", status, err)
	}
	if !bytes.Equal(r.Data(0)[:512], want) {
		return errors.New("read other data than was written")
	}
	return nil
}

// TestHandOverMessages hands a session over while messages are under way: one that is only half
// sent, and one behind it. The successor answers, and knows the memory that was added.
func TestHandOverMessages(t *testing.T) {
	disk := newRAM(t, block.Geometry{})
	s, s2 := newServer(t, Config{Device: disk}), newServer(t, Config{Device: disk})
	g := connect(t, s, vhosttest.Config{Ack: true, Slots: true})
	half := (&message{request: getQueueNum, flags: flagVersion}).encode()
	if err := g.Conn.Raw(half[:5]); err != nil {
		t.Fatal(err)
	}
	a, b := connPair(t)
	handed := make(chan error, 1)
	go func() { handed <- s.HandOver(t.Context(), a) }()
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	n.waitPaused(t)
	if err := g.Conn.Raw(append(half[5:], half...)); err != nil {
		t.Fatal(err)
	}
	x, err := Receive(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-handed; err != nil {
		t.Fatal(err)
	}
	s2.Resume(x)
	for range 2 {
		answer, _, err := g.Conn.Receive(vhosttest.GetQueueNum)
		if err != nil || !bytes.Equal(answer, words(maxRings)) {
			t.Errorf("answer %x, %v", answer, err)
		}
	}
	if err := writeAndRead(g.Rings[0], 3, 9); err != nil {
		t.Error(err)
	}
}

// waitPaused waits until a session reads no more messages.
func (n *session) waitPaused(t testing.TB) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !n.pausing.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the session is not paused")
		}
	}
}

// TestHandOverInFlight ends a session that got a request after the server had waited for those in
// flight, because it was only being set up then.
func TestHandOverInFlight(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{NoTrack: true})
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	disk.hold()
	defer disk.release()
	startWrite(g.Rings[0], 5, 1)
	disk.await(t, 1)
	a, b := connPair(t)
	n.leaving <- a
	<-n.ended
	a.Close()
	if _, err := Receive(b); err == nil {
		t.Error("the session was handed over with a request in flight")
	}
	if err := g.Conn.AwaitEnd(); err != nil {
		t.Error(err)
	}
}

// TestHandOverBroken hands sessions over to nobody, or not completely. The front end is
// disconnected, and nothing is left.
func TestHandOverBroken(t *testing.T) {
	disk := newRAM(t, block.Geometry{})
	t.Run("the other server has gone", func(t *testing.T) {
		s := newServer(t, Config{Device: disk})
		g := connect(t, s, vhosttest.Config{})
		a, b := connPair(t)
		b.Close()
		if err := s.HandOver(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		if err := g.Conn.AwaitEnd(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the other server does not resume", func(t *testing.T) {
		s := newServer(t, Config{Device: disk})
		g := connect(t, s, vhosttest.Config{Rings: 2})
		a, b := connPair(t)
		go func() { _ = s.HandOver(t.Context(), a) }()
		x, err := Receive(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := x.Close(); err != nil {
			t.Error(err)
		}
		if err := g.Conn.AwaitEnd(); err != nil {
			t.Fatal(err)
		}
	})
	for name, sent := range map[string][]*message{
		"nothing":         nil,
		"no front end":    {{request: complete}},
		"not complete":    {{request: frontEnd, fds: []int{int(os.Stdin.Fd())}}},
		"not a socket":    {{request: frontEnd, fds: []int{int(os.Stdin.Fd())}}, {request: complete}},
		"no descriptor":   {{request: frontEnd}, {request: complete}},
		"two descriptors": {{request: frontEnd, fds: []int{0, 0}}, {request: complete}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := connPair(t)
			for _, m := range sent {
				if err := sendMessage(a, m); err != nil {
					t.Fatal(err)
				}
			}
			a.Close()
			if x, err := Receive(b); err == nil || !strings.Contains(err.Error(), "receive vhost-user-blk session") {
				t.Errorf("session %v, error %v", x, err)
			}
		})
	}
	t.Run("a set-up that is refused", func(t *testing.T) {
		s := newServer(t, Config{Device: disk})
		a, b := connPair(t)
		front, other := connPair(t)
		f, err := other.File()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []*message{
			{request: frontEnd, fds: []int{int(f.Fd())}}, {request: setFeatures, payload: words(1 << 63)}, {request: complete},
		} {
			if err := sendMessage(a, m); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Close(), other.Close()); err != nil {
			t.Fatal(err)
		}
		x, err := Receive(b)
		if err != nil {
			t.Fatal(err)
		}
		s.Resume(x)
		if _, err := front.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the front end got %v", err)
		}
		s.log.await(t, "SET_FEATURES, handed over")
	})
}
