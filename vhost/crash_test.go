package vhost

import (
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// held is a device whose requests wait until they are let go. It records them in the order
// in which they arrive.
type held struct {
	block.Device
	mu     sync.Mutex
	closed bool            // requests wait
	came   []block.Request // all that have arrived
	more   chan struct{}   // has a token when one has arrived
	wake   func()
	limit  atomic.Int32 // of segments; 0: the queues have none
}

func newHeld(d block.Device) *held { return &held{Device: d, more: make(chan struct{}, 1)} }

func (d *held) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := d.Device.OpenQueue(i, cfg)
	h := &heldQueue{Queue: q, device: d}
	if d.limit.Load() > 0 {
		return &heldGatherer{h, q.(block.Gatherer)}, err
	}
	return h, err
}

// heldGatherer is a queue whose requests may have segments.
type heldGatherer struct {
	*heldQueue
	tables block.Gatherer
}

func (q *heldGatherer) Segments(tag uint16) *[block.MaxSegments]block.Segment {
	return q.tables.Segments(tag)
}
func (q *heldGatherer) SegmentLimit() int { return int(q.device.limit.Load()) }

type heldQueue struct {
	block.Queue
	device  *held
	waiting []block.Request
}

func (q *heldQueue) Submit(reqs []block.Request) {
	d := q.device
	d.mu.Lock()
	d.came = append(d.came, reqs...)
	d.mu.Unlock()
	q.waiting = append(q.waiting, reqs...)
	select {
	case d.more <- struct{}{}:
	default:
	}
}

func (q *heldQueue) Reap(done []block.Result) int {
	q.device.mu.Lock()
	closed := q.device.closed
	q.device.mu.Unlock()
	if closed {
		return 0
	}
	q.Queue.Submit(q.waiting)
	q.waiting = nil
	return q.Queue.Reap(done)
}

// hold makes requests wait.
func (d *held) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed, d.came = true, nil
}

// release lets requests go.
func (d *held) release() {
	d.mu.Lock()
	d.closed = false
	d.mu.Unlock()
	d.wake()
}

// await waits until n requests have arrived since hold, and returns their sectors.
func (d *held) await(t *testing.T, n int) (sectors []uint64) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		d.mu.Lock()
		came := slices.Clone(d.came)
		d.mu.Unlock()
		if len(came) >= n {
			for _, r := range came {
				sectors = append(sectors, r.Sector)
			}
			return sectors
		}
		select {
		case <-d.more:
		case <-limit:
			t.Fatalf("%d requests have arrived, want %d", len(came), n)
		}
	}
}

// newHeldServer serves a device whose requests can be held.
func newHeldServer(t *testing.T, d *held) *served {
	t.Helper()
	loops := newLoops(t, 2)
	d.wake = func() {
		for _, l := range loops {
			l.Wake()
		}
	}
	return newServer(t, Config{Device: d, Loops: loops, Depth: 64})
}

// write starts a write of a sector with a value.
func startWrite(r *vhosttest.Ring, sector uint64, value byte) {
	slot := r.Take()
	data := r.Data(slot)[:512]
	for i := range data {
		data[i] = value
	}
	r.Submit(r.Prepare(slot, vhosttest.Out, sector, 512))
}

// finish waits for n requests.
func finish(t *testing.T, r *vhosttest.Ring, n int) {
	t.Helper()
	for range n {
		slot, status, err := r.Wait()
		if err != nil || status != vhosttest.OK {
			t.Fatalf("status %d: %v", status, err)
		}
		r.Release(slot)
	}
	if _, _, ok := r.Reap(); ok {
		t.Fatal("a request was completed twice")
	}
}

// TestResubmit ends a session with requests in flight, as after a crash of the server. The
// next server executes them again in their order, and each of them is completed once.
func TestResubmit(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{Rings: 2})
	r := g.Rings[1]
	startWrite(r, 1, 1)
	finish(t, r, 1)
	disk.hold()
	for i := range uint64(10) {
		startWrite(r, 20-i, byte(i))
	}
	want := disk.await(t, 10)
	g.Conn.Close()
	// The next server has the same disk, and none of the requests of the first one.
	disk2 := newHeld(disk.Device)
	s2 := newHeldServer(t, disk2)
	disk2.hold()
	if err := g.Connect(s2.path); err != nil {
		t.Fatal(err)
	}
	if got := disk2.await(t, 10); !slices.Equal(got, want) {
		t.Errorf("sectors %v, want %v", got, want)
	}
	startWrite(r, 30, 99)
	disk2.release()
	finish(t, r, 11)
	for i := range uint64(10) {
		if do(t, r, vhosttest.In, 20-i, 512); r.Data(0)[0] != byte(i) {
			t.Errorf("sector %d has %d, want %d", 20-i, r.Data(0)[0], i)
		}
	}
	disk.release()
}

// TestBatchOfDeadServer restores a record that a server left between the steps in which it
// completes a batch.
func TestBatchOfDeadServer(t *testing.T) {
	for _, c := range []struct {
		name      string
		published bool // the used ring has the batch
		cleared   int  // entries of the record that are cleared
		again     int  // requests to execute again
	}{
		{"not published", false, 0, 3},
		{"published", true, 0, 1},
		{"half cleared", true, 1, 1},
		{"all cleared", true, 2, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newHeld(newRAM(t, block.Geometry{}))
			s := newHeldServer(t, disk)
			g := connect(t, s, vhosttest.Config{})
			r := g.Rings[0]
			startWrite(r, 7, 7)
			finish(t, r, 1)
			disk.hold()
			for i := range uint64(3) {
				startWrite(r, 10+i, byte(i))
			}
			disk.await(t, 3)
			g.Conn.Close()
			// The dead server was about to complete the first two requests.
			rec, err := g.Inflight()
			if err != nil {
				t.Fatal(err)
			}
			le := binary.LittleEndian
			last := le.Uint16(rec[12:])
			heads := []uint16{}
			for i := range 128 {
				if rec[16+16*i] != 0 {
					heads = append(heads, uint16(i))
				}
			}
			slices.SortFunc(heads, func(a, b uint16) int {
				return int(le.Uint64(rec[16+16*int(a)+8:])) - int(le.Uint64(rec[16+16*int(b)+8:]))
			})
			if len(heads) != 3 {
				t.Fatalf("in flight: %v", heads)
			}
			done := heads[:2]
			for _, h := range done {
				le.PutUint16(rec[16+16*int(h)+6:], last)
				last = h
			}
			le.PutUint16(rec[12:], last)
			if c.published {
				for _, h := range done {
					r.PutUsed(h)
				}
			}
			for _, h := range done[:c.cleared] {
				rec[16+16*int(h)] = 0
			}
			disk2 := newHeld(disk.Device)
			s2 := newHeldServer(t, disk2)
			disk2.hold()
			if err := g.Connect(s2.path); err != nil {
				t.Fatal(err)
			}
			startWrite(r, 40, 1)
			if got := disk2.await(t, c.again+1); len(got) != c.again+1 || got[c.again] != 40 {
				t.Errorf("sectors %v, want %d and then 40", got, c.again)
			}
			disk2.release()
			finish(t, r, 4)
			disk.release()
		})
	}
}

// TestNoOvertaking ends a session with a write at the back end. Requests of the next session
// wait until the write has ended, because they could overtake it.
func TestNoOvertaking(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{Rings: 2, NoTrack: true})
	disk.hold()
	startWrite(g.Rings[0], 5, 1)
	disk.await(t, 1)
	g.Conn.Close()
	other := connect(t, s, vhosttest.Config{Rings: 2, Ack: true})
	startWrite(other.Rings[1], 5, 2)
	// All rings are served when the reply to another message has come.
	if err := other.Conn.Send(vhosttest.SetVringEnable, vhosttest.State(1, 1)); err != nil {
		t.Fatal(err)
	}
	if got := disk.await(t, 1); len(got) != 1 {
		t.Fatalf("sectors %v: a request has overtaken another", got)
	}
	disk.release()
	finish(t, other.Rings[1], 1)
	if do(t, other.Rings[1], vhosttest.In, 5, 512); other.Rings[1].Data(0)[0] != 2 {
		t.Errorf("sector has %d, want 2", other.Rings[1].Data(0)[0])
	}
	if _, _, ok := g.Rings[0].Reap(); ok {
		t.Error("the guest's memory was written after the end of its session")
	}
}

// TestStopWithRequests stops rings and the device with requests in flight.
func TestStopWithRequests(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{Rings: 2, Ack: true})
	r := g.Rings[0]
	disk.hold()
	startWrite(r, 5, 1)
	disk.await(t, 1)
	stopped := make(chan uint32)
	go func() {
		base, err := r.Stop()
		if err != nil {
			t.Error(err)
		}
		stopped <- base
	}()
	// The other ring is served meanwhile.
	startWrite(g.Rings[1], 6, 1)
	disk.await(t, 2)
	select {
	case <-stopped:
		t.Fatal("the ring was stopped with a request in flight")
	default:
	}
	disk.release()
	if base := <-stopped; base != 1 {
		t.Errorf("base %d", base)
	}
	finish(t, r, 1)
	finish(t, g.Rings[1], 1)

	// A reset gives requests up.
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	disk.hold()
	startWrite(r, 5, 2)
	disk.await(t, 1)
	if err := g.Conn.Send(vhosttest.ResetDevice, nil); err != nil {
		t.Fatal(err)
	}
	disk.release()
	if _, _, ok := r.Reap(); ok {
		t.Error("a request of a device that was reset was completed")
	}
	// The guest begins anew, with the same record.
	r.Begin()
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	startWrite(r, 5, 3)
	finish(t, r, 1)
}

// TestStopWhileResubmitting stops a ring whose requests of an earlier server have not all
// been executed again.
func TestStopWhileResubmitting(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{Ack: true})
	r := g.Rings[0]
	disk.hold()
	for i := range uint64(5) {
		startWrite(r, i, 1)
	}
	disk.await(t, 5)
	g.Conn.Close()
	loops := newLoops(t, 1)
	disk2 := newHeld(disk.Device)
	disk2.wake = func() { loops[0].Wake() }
	s2 := newServer(t, Config{Device: disk2, Loops: loops, Depth: 2})
	disk2.hold()
	if err := g.Connect(s2.path); err != nil {
		t.Fatal(err)
	}
	disk2.await(t, 2)
	go func() {
		for stopping := false; !stopping; {
			_ = loops[0].Call(func() { stopping = s2.workers[0].rings[0].stopping })
		}
		disk2.release()
	}()
	if base, err := r.Stop(); err != nil || base != 5 {
		t.Errorf("base %d, %v", base, err)
	}
	finish(t, r, 5)
	disk.release()
}

// TestNoNotifyOfDeadServer begins with a ring in which a server that has died had told the
// guest not to kick.
func TestNoNotifyOfDeadServer(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := newGuest(t, vhosttest.Config{Features: ^uint64(vhosttest.FeatEventIdx), Ack: true})
	g.Mem[g.Rings[0].Used] = 1
	if err := g.Connect(s.path); err != nil {
		t.Fatal(err)
	}
	limit := time.After(20 * time.Second)
	for g.Rings[0].MustNotKick() {
		select {
		case <-limit:
			t.Fatal("the guest must not kick")
		case <-time.After(time.Millisecond):
		}
	}
	if got := do(t, g.Rings[0], vhosttest.In, 0, 512); got != vhosttest.OK {
		t.Fatalf("status %d", got)
	}
}

// TestHandOver hands a front end over to another server with requests in flight.
func TestHandOver(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s, s2 := newHeldServer(t, disk), newHeldServer(t, newHeld(disk.Device))
	g := connect(t, s, vhosttest.Config{Rings: 2})
	r := g.Rings[0]
	disk.hold()
	startWrite(r, 5, 1)
	disk.await(t, 1)
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.HandOver(short, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("hand over with a request in flight: %v", err)
	}
	if err := g.Connect(s2.path); err != nil {
		t.Fatal(err)
	}
	finish(t, r, 1)
	disk.release()
	// Now without one in flight.
	startWrite(r, 6, 1)
	finish(t, r, 1)
	if err := s2.HandOver(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := g.Conn.AwaitEnd(); err != nil {
		t.Fatal(err)
	}
}

// TestBusy checks that a server with a front end ends only by force.
func TestBusy(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := connect(t, s, vhosttest.Config{})
	if err := s.Stop(t.Context(), false); !errors.Is(err, ErrBusy) {
		t.Fatal(err)
	}
	do(t, g.Rings[0], vhosttest.In, 0, 512)
}

// TestStopGivesUp stops a server whose back end does not answer.
func TestStopGivesUp(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{})
	disk.hold()
	startWrite(g.Rings[0], 5, 1)
	disk.await(t, 1)
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Stop(short, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	disk.release()
	if err := s.Stop(t.Context(), true); err != nil {
		t.Fatal(err)
	}
}

// TestRemovedRegion removes memory with a read in flight that uses it, and memory that no
// request uses.
func TestRemovedRegion(t *testing.T) {
	disk := newHeld(newRAM(t, block.Geometry{}))
	s := newHeldServer(t, disk)
	g := connect(t, s, vhosttest.Config{Slots: true, Ack: true, Features: ^uint64(vhosttest.FeatIndirect)})
	r := g.Rings[0]
	unused := vhosttest.Single(vhosttest.Area(1<<30, 4096))
	copy(unused[8+24:], make([]byte, 8)) // offset 0
	disk.hold()
	startWrite(r, 5, 1)
	disk.await(t, 1)
	for _, message := range []uint32{vhosttest.AddMemReg, vhosttest.RemMemReg} {
		if err := g.Conn.Send(message, unused, g.FD); err != nil {
			t.Fatal(err)
		}
	}
	disk.release()
	finish(t, r, 1)
	_, second := g.Halves()
	disk.hold()
	slot := r.Free() - 1
	r.Submit(r.Prepare(uint16(slot), vhosttest.In, 0, 32<<10)) // in the second region
	disk.await(t, 1)
	if err := g.Conn.Send(vhosttest.RemMemReg, vhosttest.Single(second)); err != nil {
		t.Fatal(err)
	}
	disk.release()
	ends(t, s, g, "removed while a request used it")
}

// TestStopAsLastOrphanEnds stops servers while their last orphan ends. The loop must not wait for
// Stop then, which waits for the loop.
func TestStopAsLastOrphanEnds(t *testing.T) {
	loops := newLoops(t, 1)
	device := newNull(t)
	for range 500 {
		s, err := New(Config{Device: device, Loops: loops, Depth: 1, MaxIO: 4096})
		if err != nil {
			t.Fatal(err)
		}
		s.orphans.Add(1)
		go loops[0].Call(s.orphanEnded)
		done := make(chan error, 1)
		go func() {
			for s.orphans.Load() > 0 { // Stop may also find it gone without a wait
				runtime.Gosched()
			}
			done <- s.Stop(context.Background(), true)
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("Stop and the loop wait for each other")
		}
	}
}
