package vhost

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// TestHandOverHalf has a front end send a part of a message and no more. Its bytes have been read, so
// the session is not handed over: nobody could find the next message.
func TestHandOverHalf(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string][]byte{
		"header":  vhosttest.Header(vhosttest.SetFeatures, flagVersion, 8)[:5],
		"payload": append(vhosttest.Header(vhosttest.SetFeatures, flagVersion, 8), 1, 2, 3),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
			g := connect(t, s, vhosttest.Config{})
			if err := g.Conn.Raw(sent); err != nil {
				t.Fatal(err)
			}
			awaitRead(t, s)
			a, b := connPair(t)
			if err := s.HandOver(t.Context(), a); err != nil {
				t.Fatal(err)
			}
			a.Close()
			if x, err := Receive(b); err == nil {
				t.Error("a session was handed over within a message", x.Close())
			}
			s.log.await(t, errHalf.Error())
		})
	}
}

// awaitRead waits until the session of a server has read all bytes that were sent.
func awaitRead(t testing.TB, s *served) {
	t.Helper()
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	raw, err := n.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		left := 0
		var ioctl error
		if err := errors.Join(raw.Control(func(fd uintptr) { left, ioctl = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }), ioctl); err != nil {
			t.Fatal(err)
		}
		if left == 0 {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("%d bytes were not read", left)
		}
	}
}

// TestHandOverMemory hands over a guest with memory modules, one of which was removed. The successor
// uses those that are left, removes one, and takes a new one.
func TestHandOverMemory(t *testing.T) {
	for name, cfg := range map[string]vhosttest.Config{"table": {Ack: true}, "slots": {Ack: true, Slots: true}} {
		t.Run(name, func(t *testing.T) {
			disk := newRAM(t, block.Geometry{})
			s, s2 := newServer(t, Config{Device: disk}), newServer(t, Config{Device: disk})
			g := connect(t, s, cfg)
			var modules []*vhosttest.Module
			for i := range 4 {
				m, err := vhosttest.NewModule(i, 1<<20, false)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { m.Close() })
				modules = append(modules, m)
			}
			do := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, m := range modules[:3] {
				do(g.Plug(m))
			}
			do(g.Unplug(modules[1]))
			do(writeAndReadModule(g.Rings[0], modules[0], 1))
			handOver(t, s, s2)
			do(writeAndReadModule(g.Rings[0], modules[0], 2))
			do(writeAndReadModule(g.Rings[0], modules[2], 3))
			do(g.Unplug(modules[0]))
			do(g.Plug(modules[3]))
			do(writeAndReadModule(g.Rings[0], modules[3], 4))
			do(writeAndRead(g.Rings[0], 1, 5))
		})
	}
}

// writeAndReadModule is writeAndRead with data in a module.
func writeAndReadModule(r *vhosttest.Ring, m *vhosttest.Module, n byte) error {
	want := bytes.Repeat([]byte{n}, 4096)
	copy(m.Mem, want)
	for _, kind := range []uint32{vhosttest.Out, vhosttest.In} {
		r.Submit(r.PrepareAt(0, kind, 8, m.Base, 4096))
		if _, status, err := r.Wait(); err != nil || status != vhosttest.OK {
			return errors.Join(errors.New("the request failed"), err)
		}
		if kind == vhosttest.Out {
			clear(m.Mem[:4096])
		}
	}
	if !bytes.Equal(m.Mem[:4096], want) {
		return errors.New("read other data than was written")
	}
	return nil
}

// TestHandOverLog hands a session over during a migration. The successor logs what it writes, and
// stops when it is told.
func TestHandOverLog(t *testing.T) {
	disk := newRAM(t, block.Geometry{})
	s, s2 := newServer(t, Config{Device: disk}), newServer(t, Config{Device: disk})
	g := connect(t, s, vhosttest.Config{Ack: true, Features: ^uint64(vhosttest.FeatIndirect)})
	log, err := g.StartLog(0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	r := g.Rings[0]
	_, data := r.Slot(0)
	page := (vhosttest.GuestBase + data) / 4096
	read := func() []uint64 {
		t.Helper()
		log.Take()
		if status, err := r.Do(0, vhosttest.In, 0, 512); err != nil || status != vhosttest.OK {
			t.Fatal(status, err)
		}
		return log.Take()
	}
	before := read()
	handOver(t, s, s2)
	if after := read(); !slices.Contains(after, page) || !slices.Equal(before, after) {
		t.Errorf("the successor logs pages %v of a read, the first server %v", after, before)
	}
	if err := g.StopLog(); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != nil {
		t.Errorf("pages %v are logged after the end", got)
	}
}
