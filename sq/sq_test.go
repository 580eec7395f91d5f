package sq

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// adapter is a device whose sends complete when the test requires it.
type adapter struct {
	posted []rdma.SendWR
	done   []rdma.WC
	memory
}

type memory struct {
	bytes  []byte
	closed int   // calls, of the completion queue's and the region's Close
	busy   error // what they give
}

func (m *memory) Bytes() []byte { return m.bytes }
func (m *memory) Addr() uint64  { return 0x10000 }
func (m *memory) LKey() uint32  { return 7 }
func (m *memory) RKey() uint32  { return 8 }
func (m *memory) Close() error  { m.closed++; return m.busy }

func (a *adapter) Attr() rdma.DeviceAttr                    { return rdma.DeviceAttr{} }
func (a *adapter) Removed() <-chan struct{}                 { return nil }
func (a *adapter) AllocPD() (rdma.PD, error)                { return a, nil }
func (a *adapter) CreateCQ(int, bool, int) (rdma.CQ, error) { return a, nil }
func (a *adapter) AllocMR(n int, _ rdma.Access) (rdma.MR, error) {
	a.bytes = make([]byte, n)
	return &a.memory, nil
}
func (a *adapter) RegMR([]byte, rdma.Access) (rdma.MR, error) { return &a.memory, nil }
func (a *adapter) Num() uint32                                { return 1 }
func (a *adapter) PostRecv([]rdma.RecvWR) (int, error)        { return 0, nil }
func (a *adapter) Fail() error                                { return nil }
func (a *adapter) Arm() error                                 { return nil }
func (a *adapter) FD() int                                    { return -1 }
func (a *adapter) Ack(int)                                    {}
func (a *adapter) PostSend(wrs []rdma.SendWR) (int, error) {
	a.posted = append(a.posted, wrs...)
	return len(wrs), nil
}

func (a *adapter) Poll(wcs []rdma.WC) (int, error) {
	n := copy(wcs, a.done)
	a.done = a.done[:copy(a.done, a.done[n:])]
	return n, nil
}

// complete completes the oldest n sends, in order. Like an adapter, it reports only the
// signaled ones.
func (a *adapter) complete(n int) {
	for _, wr := range a.posted[:n] {
		if wr.Signaled {
			a.done = append(a.done, rdma.WC{ID: wr.ID})
		}
	}
	a.posted = a.posted[:copy(a.posted, a.posted[n:])]
}

func newQueue(t testing.TB, depth int) (*Queue, *adapter) {
	t.Helper()
	a := &adapter{posted: make([]rdma.SendWR, 0, 8192), done: make([]rdma.WC, 0, 8192)}
	q, err := New(a, a, Config{Depth: depth})
	if err != nil {
		t.Fatal(err)
	}
	q.Bind(a)
	return q, a
}

func TestBounds(t *testing.T) {
	for _, cfg := range []Config{{Depth: -1}, {}, {Depth: 1}, {Depth: MaxDepth + 1}, {Depth: 16, Descriptors: -1}, {Depth: 16, Descriptors: MaxDescriptors + 1}} {
		if _, err := New(&adapter{}, &adapter{}, cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}

// TestNeverMoreThanDepth takes as many slots as possible: one less than the depth, and
// then only as many as there were answers.
func TestNeverMoreThanDepth(t *testing.T) {
	q, _ := newQueue(t, 16)
	var slots []uint16
	for {
		slot, _, ok := q.Get()
		if !ok {
			break
		}
		q.Push(slot, rdma.SGE{})
		slots = append(slots, slot)
	}
	if len(slots) != 15 {
		t.Fatalf("%d commands outstanding at depth 16", len(slots))
	}
	q.Answer(slots[3])
	if _, _, ok := q.Get(); !ok {
		t.Fatal("no slot after an answer")
	}
	if _, _, ok := q.Get(); ok {
		t.Fatal("a slot more than was answered")
	}
}

// TestStaleResponses checks ids that must not match a command.
func TestStaleResponses(t *testing.T) {
	q, a := newQueue(t, 16)
	slot, _, _ := q.Get()
	q.Push(slot, rdma.SGE{})
	if _, err := q.Flush(); err != nil {
		t.Fatal(err)
	}
	cid := q.commandID(slot)
	for name, id := range map[string]uint16{
		"a free slot":            cid&^slotMask | (slot+1)&slotMask,
		"a slot beyond the slab": cid&^slotMask | slotMask,
		"another generation":     cid ^ 1<<slotBits,
	} {
		if _, ok := q.Match(id); ok {
			t.Errorf("%s matches", name)
		}
	}
	if got, ok := q.Match(cid); !ok || got != slot {
		t.Fatalf("match %#x: %d, %v", cid, got, ok)
	}
	q.Answer(slot)
	if _, ok := q.Match(cid); ok {
		t.Error("a second response matches before the send completed")
	}
	// Take slots until the same one comes back. Its id has changed.
	for range 200 {
		a.complete(len(a.posted))
		if _, err := q.Reap(); err != nil {
			t.Fatal(err)
		}
		s, _, ok := q.Get()
		if !ok {
			t.Fatal("no slot")
		}
		q.Push(s, rdma.SGE{})
		if s == slot {
			if _, ok := q.Match(cid); ok {
				t.Fatal("the id of the command before matches the next one")
			}
			return
		}
		if _, err := q.Flush(); err != nil {
			t.Fatal(err)
		}
		q.Answer(s)
	}
	t.Fatal("the slot never came back")
}

// TestDataInCapsule checks that a command with data in its capsule is like any other: its
// send is gathered from two places and not signaled, and its slot stays taken until the
// send is known to be complete.
func TestDataInCapsule(t *testing.T) {
	q, a := newQueue(t, 16)
	slot, _, _ := q.Get()
	q.Push(slot, rdma.SGE{Addr: 1, Length: 512, LKey: 2})
	q.Flush()
	if wr := a.posted[0]; wr.Signaled || wr.NumSGE != 2 || wr.SGE[1].Length != 512 {
		t.Fatalf("posted %+v", wr)
	}
	q.Answer(slot)
	for range q.interval - 1 {
		if slices.Contains(q.free, slot) {
			t.Fatal("the slot is free before its send is complete")
		}
		s, _, _ := q.Get()
		q.Push(s, rdma.SGE{})
	}
	q.Flush()
	a.complete(q.interval)
	if n, err := q.Reap(); n != 1 || err != nil || !slices.Contains(q.free, slot) {
		t.Fatalf("%d completions, %v, free slots %v, want %d among them", n, err, q.free, slot)
	}
}

// TestList checks that a list of descriptors is sent in one piece with its command, that only as much
// of it is sent as was asked for, and that the lists of commands do not overlap.
func TestList(t *testing.T) {
	a := &adapter{}
	q, err := New(a, a, Config{Depth: 16, Descriptors: 3})
	if err != nil {
		t.Fatal(err)
	}
	q.Bind(a)
	for n := range 4 {
		slot, cmd, ok := q.Get()
		if !ok {
			t.Fatal("no slot")
		}
		list := q.Descriptors(slot)
		if len(list) != 3*nvme.SGLSize || cap(list) != len(list) {
			t.Fatalf("room for %d bytes of descriptors", len(list))
		}
		for i := range cmd {
			cmd[i] = byte(n + 1)
		}
		for i := range list {
			list[i] = byte(0x10 * (n + 1))
		}
		q.PushList(slot, n)
	}
	slot, _, _ := q.Get()
	q.Push(slot, rdma.SGE{Addr: 1, Length: 512, LKey: 2})
	q.Flush()
	for n, wr := range a.posted[:4] {
		if wr.Op != rdma.Send || wr.NumSGE != 1 || wr.SGE[0].Length != uint32(64+16*n) || wr.SGE[0].LKey != a.LKey() {
			t.Errorf("list of %d: posted %+v", n, wr)
		}
		at := wr.SGE[0].Addr - a.Addr()
		capsule := a.bytes[at:][:64+16*3]
		capsule[2], capsule[3] = byte(n+1), byte(n+1) // the command id
		for i, b := range capsule {
			if want := byte(n + 1); i < 64 && b != want || i >= 64 && b != 0x10*want {
				t.Fatalf("list of %d: byte %d is %#x", n, i, b)
			}
		}
	}
	if wr := a.posted[4]; wr.NumSGE != 2 || wr.SGE[0].Length != 64 {
		t.Errorf("data in the capsule: posted %+v", wr)
	}
	if q.Confirmed(q.Mark()) || q.Mark() != 5 {
		t.Errorf("mark %d: lists need no mark, data in a capsule does", q.Mark())
	}
}

// TestProbe checks that there is one probe at a time, and that its completion is not
// taken for that of a SEND, but confirms the SENDs before it.
func TestProbe(t *testing.T) {
	q, a := newQueue(t, 16)
	slot, _, _ := q.Get()
	q.Push(slot, rdma.SGE{Addr: 1, Length: 512, LKey: 2})
	q.Flush()
	q.Answer(slot)
	for i := range 3 {
		for range 2 {
			if err := q.Probe(); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(a.posted); n != 2 {
			t.Fatalf("%d work requests posted, want a SEND and a probe", n)
		}
		if wr := a.posted[1]; wr.Op != rdma.Write || wr.NumSGE != 0 || !wr.Signaled {
			t.Fatalf("posted %+v", wr)
		}
		if !q.Scarce() {
			t.Fatal("nobody would look for the completion")
		}
		if q.Confirmed(q.Mark()) || slices.Contains(q.free, slot) {
			t.Fatal("a SEND is confirmed before the probe behind it is complete")
		}
		later, _, _ := q.Get() // neither posted nor covered by the probe
		q.Push(later, rdma.SGE{Addr: 1, Length: 512, LKey: 2})
		a.complete(2)
		if n, err := q.Reap(); n != 1 || err != nil || q.Scarce() {
			t.Fatalf("%d completions, %v", n, err)
		}
		if !slices.Contains(q.free, slot) || slices.Contains(q.free, later) || !q.Confirmed(uint64(i+1)) || q.Confirmed(q.Mark()) {
			t.Fatal("a probe does not confirm just the SENDs before it")
		}
		slot = later
		q.Flush()
		q.Answer(slot)
	}
	q.Probe()
	a.done = append(a.done, rdma.WC{ID: a.posted[1].ID, Status: rdma.WCRetryExc})
	if _, err := q.Reap(); err == nil {
		t.Error("a probe without an answer is no error")
	}
}

// TestMark checks that only SENDs with data have to be confirmed.
func TestMark(t *testing.T) {
	q, _ := newQueue(t, 16)
	push := func(data rdma.SGE) {
		slot, _, _ := q.Get()
		q.Push(slot, data)
		q.Flush()
	}
	push(rdma.SGE{})
	if !q.Confirmed(q.Mark()) {
		t.Error("a SEND without data has to be confirmed")
	}
	push(rdma.SGE{Addr: 1, Length: 512, LKey: 2})
	want := q.Mark()
	push(rdma.SGE{})
	if q.Confirmed(want) || q.Mark() != want {
		t.Errorf("mark %d after a SEND without data, %d before", q.Mark(), want)
	}
}

// TestRandomOrder drives a queue with answers and send completions in random order. It
// checks against a model that no slot is assigned while its capsule may still be sent,
// and that the queue always recovers free slots.
func TestRandomOrder(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 1))
		q, a := newQueue(t, 2+rng.IntN(40))
		inUse := map[uint16]bool{} // by the controller or the adapter
		answered := map[uint16]bool{}
		var open []uint16 // not answered
		var sends []uint16
		for step := 0; step < 4000; step++ {
			switch rng.IntN(3) {
			case 0:
				slot, _, ok := q.Get()
				if !ok && len(open) < q.depth-1 && len(a.posted) == 0 && q.Pending() == 0 {
					// Every send has completed. This must be enough.
					if _, err := q.Reap(); err != nil {
						t.Fatal(err)
					}
					if slot, _, ok = q.Get(); !ok {
						t.Fatalf("seed %d: dry with %d of %d open", seed, len(open), q.depth-1)
					}
					for s := range answered {
						delete(inUse, s)
						delete(answered, s)
					}
				}
				if !ok {
					continue
				}
				if inUse[slot] {
					t.Fatalf("seed %d: slot %d given out while in use", seed, slot)
				}
				inUse[slot] = true
				var data rdma.SGE
				if rng.IntN(4) == 0 {
					data.Length = 512
				}
				q.Push(slot, data)
				open = append(open, slot)
				sends = append(sends, slot)
			case 1:
				if _, err := q.Flush(); err != nil {
					t.Fatal(err)
				}
				if len(open) == 0 {
					continue
				}
				i := rng.IntN(len(open))
				q.Answer(open[i])
				answered[open[i]] = true
				open = append(open[:i], open[i+1:]...)
			case 2:
				n := rng.IntN(len(a.posted) + 1)
				a.complete(n)
				sends = sends[n:]
				if _, err := q.Reap(); err != nil {
					t.Fatal(err)
				}
			}
			for s := range answered {
				if !slices.Contains(sends, s) {
					delete(inUse, s)
					delete(answered, s)
				}
			}
		}
	}
}

func roundTrip(q *Queue, a *adapter, n int) {
	var slots [32]uint16
	for i := range n {
		slot, cmd, _ := q.Get()
		cmd.SetRead(1, uint64(i), 8, false)
		cmd.SetKeyedSGL(0x1000, 4096, 1, false)
		q.Push(slot, rdma.SGE{})
		slots[i] = slot
	}
	q.Flush()
	for _, s := range slots[:n] {
		if m, ok := q.Match(q.commandID(s)); ok {
			q.Answer(m)
		}
	}
	a.complete(len(a.posted))
	if q.Scarce() {
		q.Reap()
	}
}

func TestNoAllocations(t *testing.T) {
	q, a := newQueue(t, 128)
	if n := testing.AllocsPerRun(1000, func() { roundTrip(q, a, 32) }); n != 0 {
		t.Fatalf("%v allocations per batch of 32 commands", n)
	}
}

func BenchmarkSubmitAnswer(b *testing.B) {
	for name, n := range map[string]int{"QD1": 1, "QD32": 32} {
		b.Run(name, func(b *testing.B) {
			q, a := newQueue(b, 128)
			b.ReportAllocs()
			for b.Loop() {
				roundTrip(q, a, n)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/command")
		})
	}
}

// TestCloseOrder checks that a queue that is closed too early stays usable, and that a
// closed queue does no harm.
func TestCloseOrder(t *testing.T) {
	q, a := newQueue(t, 8)
	slot, _, ok := q.Get()
	if !ok {
		t.Fatal("no slot")
	}
	a.busy = errBusy
	if err := q.Close(); !errors.Is(err, errBusy) || a.closed != 1 {
		t.Errorf("close in use: %v, %d calls", err, a.closed)
	}
	q.Push(slot, rdma.SGE{}) // the capsules are still there
	if n, err := q.Flush(); n != 1 || err != nil {
		t.Errorf("posted %d: %v", n, err)
	}
	a.busy = nil
	for range 2 {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	a.bytes = nil // unmapped
	if _, _, ok := q.Get(); ok {
		t.Error("a slot of a closed queue")
	}
	for range 100 {
		q.Push(slot, rdma.SGE{})
	}
	if n, err := q.Flush(); n != 0 || err != nil {
		t.Errorf("posted %d: %v", n, err)
	}
	if err := q.Probe(); !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("probe: %v", err)
	}
	if n, err := q.Reap(); n != 0 || !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("reaped %d: %v", n, err)
	}
}

var errBusy = errors.New("in use")
