package vhost

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// heldRegions is a held device with regions.
type heldRegions struct{ *held }

func (d heldRegions) Register(mem []byte) (block.Region, error) {
	return d.Device.(block.Registrar).Register(mem)
}

// direct returns how many of the requests that came had their data in a region.
func (d *held) direct() (regions, all int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.came {
		if r.InRegion() {
			regions++
		}
	}
	return regions, len(d.came)
}

// newZeroCopyServer serves a device whose requests can be held, without copies.
func newZeroCopyServer(t *testing.T, d *held) *served {
	t.Helper()
	loops := newLoops(t, 2)
	d.wake = func() {
		for _, l := range loops {
			l.Wake()
		}
	}
	return newServer(t, Config{Device: heldRegions{d}, Loops: loops, Depth: 64, MaxIO: 16 << 10, ZeroCopy: true})
}

// TestZeroCopyData is TestData without copies, and with memory that cannot be registered.
func TestZeroCopyData(t *testing.T) {
	for name, cfg := range configs {
		for _, lb := range []uint32{512, 4096} {
			for _, sealed := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%d/sealed=%v", name, lb, sealed), func(t *testing.T) {
					d := newHeld(newRAM(t, dataGeometry(lb)))
					s := newZeroCopyServer(t, d)
					cfg.Sealed = sealed
					testData(t, connect(t, s, cfg), lb)
					regions, all := d.direct()
					if sealed != (regions > 0) {
						t.Errorf("%d of %d requests had no copy", regions, all)
					}
					if !sealed {
						s.log.await(t, "F_SEAL_SHRINK")
					}
				})
			}
		}
	}
}

// TestNeedsRegistrar: zero copy is refused if the device cannot do it.
func TestNeedsRegistrar(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	if _, err := New(Config{Device: d, Loops: newLoops(t, 1), ZeroCopy: true}); err == nil {
		t.Error("no error")
	}
}

// TestReplacedMemory has the front end replace the memory while requests are at the back end that
// access it. They are executed again with the new mapping.
func TestReplacedMemory(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newZeroCopyServer(t, d)
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, NoTrack: true})
	r := g.Rings[0]
	const size = 16 << 10
	pattern := bytes.Repeat([]byte("written!"), size/8)
	copy(r.Data(5), pattern)
	if status, err := r.Do(5, vhosttest.Out, 0, size); err != nil || status != vhosttest.OK {
		t.Fatal(status, err)
	}
	d.hold()
	copy(r.Data(6), slices.Repeat([]byte("another!"), size/8))
	r.Submit(r.Prepare(6, vhosttest.Out, 64, size), r.Prepare(7, vhosttest.In, 0, size))
	d.await(t, 2)
	if err := g.SendMemory(); err != nil { // the server answers when the old mapping is gone
		t.Fatal(err)
	}
	d.release()
	for range 2 {
		if slot, status, err := r.Wait(); err != nil || status != vhosttest.OK {
			t.Fatalf("slot %d: status %d, %v", slot, status, err)
		}
	}
	if !bytes.Equal(r.Data(7)[:size], pattern) {
		t.Error("the read has wrong data")
	}
	if status, err := r.Do(8, vhosttest.In, 64, size); err != nil || status != vhosttest.OK || !bytes.Equal(r.Data(8)[:size], r.Data(6)[:size]) {
		t.Errorf("the write has written something else: %d, %v", status, err)
	}
	if regions, all := d.direct(); regions != all {
		t.Errorf("%d of %d requests had no copy", regions, all)
	}
}

// TestRemovedZeroCopyRegion has the front end remove memory for good that requests at the back end
// access. The session ends.
func TestRemovedZeroCopyRegion(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newZeroCopyServer(t, d)
	g := connect(t, s, vhosttest.Config{Ack: true, Slots: true, Sealed: true})
	r := g.Rings[0]
	first, second := g.Halves()
	d.hold()
	r.Submit(r.Prepare(9, vhosttest.In, 0, 4096)) // the data of slot 9 is in the second half
	d.await(t, 1)
	if err := g.Conn.Send(vhosttest.RemMemReg, vhosttest.Single(second), g.FD); err != nil {
		t.Fatal(err)
	}
	d.release()
	s.log.await(t, errRemoved.Error())
	_ = first
}

// TestResetZeroCopy gives up requests at the back end that access the guest's memory. When the
// front end has its answer, they do not any more.
func TestResetZeroCopy(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newZeroCopyServer(t, d)
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, NoTrack: true})
	r := g.Rings[0]
	d.hold()
	r.Submit(r.Prepare(9, vhosttest.In, 0, 4096))
	d.await(t, 1)
	if err := g.Conn.Send(vhosttest.ResetDevice, nil); err != nil {
		t.Fatal(err)
	}
	mine := []byte("the guest uses its buffer again")
	copy(r.Data(9), mine)
	d.release()
	r.Begin()
	for _, r := range g.Rings {
		if err := r.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if status, err := r.Do(0, vhosttest.In, 0, 4096); err != nil || status != vhosttest.OK {
		t.Fatal(status, err)
	}
	if !bytes.HasPrefix(r.Data(9), mine) {
		t.Error("a request that was given up has written to the guest's memory")
	}
}
