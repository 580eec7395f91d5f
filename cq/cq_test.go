package cq

import (
	"errors"
	"strings"
	"testing"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// adapter receives messages that the test puts into its buffers.
type adapter struct {
	bytes  []byte
	posted []rdma.RecvWR
	posts  int // calls of PostRecv
	done   []rdma.WC
	closed int   // calls of Close
	busy   error // what it gives
}

const base = 0x10000

func (a *adapter) Attr() rdma.DeviceAttr                    { return rdma.DeviceAttr{} }
func (a *adapter) AllocPD() (rdma.PD, error)                { return a, nil }
func (a *adapter) CreateCQ(int, bool, int) (rdma.CQ, error) { return a, nil }
func (a *adapter) Removed() <-chan struct{}                 { return nil }
func (a *adapter) AllocMR(n int, _ rdma.Access) (rdma.MR, error) {
	a.bytes = make([]byte, n)
	return region{a}, nil
}
func (a *adapter) Close() error                               { a.closed++; return a.busy }
func (a *adapter) RegMR([]byte, rdma.Access) (rdma.MR, error) { return region{a}, nil }
func (a *adapter) Num() uint32                                { return 1 }
func (a *adapter) PostSend([]rdma.SendWR) (int, error)        { return 0, nil }
func (a *adapter) Fail() error                                { return nil }
func (a *adapter) Arm() error                                 { return nil }
func (a *adapter) FD() int                                    { return -1 }
func (a *adapter) Ack(int)                                    {}
func (a *adapter) PostRecv(wrs []rdma.RecvWR) (int, error) {
	a.posts++
	a.posted = append(a.posted, wrs...)
	return len(wrs), nil
}

func (a *adapter) Poll(wcs []rdma.WC) (int, error) {
	n := copy(wcs, a.done)
	a.done = a.done[:copy(a.done, a.done[n:])]
	return n, nil
}

type region struct{ *adapter }

func (r region) Bytes() []byte { return r.bytes }
func (r region) Addr() uint64  { return base }
func (r region) LKey() uint32  { return 7 }
func (r region) RKey() uint32  { return 8 }

// respond puts a response with a command id into the oldest posted buffer.
func (a *adapter) respond(cid uint16) {
	wr := a.posted[0]
	a.posted = a.posted[:copy(a.posted, a.posted[1:])]
	at := wr.SGE.Addr - base
	nvme.CompletionAt(a.bytes[at:at+cqeSize]).Set(uint64(cid)*3, 0, cid, 0)
	a.done = append(a.done, rdma.WC{ID: wr.ID, Bytes: wr.SGE.Length, Recv: true})
}

func newQueue(t testing.TB, depth int) (*Queue, *adapter) {
	t.Helper()
	a := &adapter{}
	q, err := New(a, a, Config{Depth: depth})
	if err != nil {
		t.Fatal(err)
	}
	q.Bind(a)
	if err := q.Fill(); err != nil {
		t.Fatal(err)
	}
	return q, a
}

// TestEveryResponseInOrder sends more responses than there are buffers, in
// bursts of every size up to the depth.
func TestEveryResponseInOrder(t *testing.T) {
	const depth = 100
	q, a := newQueue(t, depth)
	next, want := uint16(0), uint16(0)
	for burst := 1; burst <= depth; burst++ {
		for range burst {
			a.respond(next)
			next++
		}
		for want != next {
			events, err := q.Poll()
			if err != nil || len(events) == 0 {
				t.Fatalf("burst %d: %d events, %v", burst, len(events), err)
			}
			for _, e := range events {
				if e.Completion.CID() != want || e.Completion.Result() != uint64(want)*3 {
					t.Fatalf("response %v, want command %d", e.Completion, want)
				}
				want++
			}
		}
		if len(a.posted) < depth {
			t.Fatalf("%d buffers posted, and %d commands may be outstanding", len(a.posted), depth)
		}
	}
}

// TestFewPosts sends responses one by one, as at queue depth 1, and counts the calls.
func TestFewPosts(t *testing.T) {
	const depth, responses = 128, 1000
	q, a := newQueue(t, depth)
	for range uint16(responses) {
		a.respond(0)
		if events, err := q.Poll(); err != nil || len(events) != 1 {
			t.Fatalf("%d events, %v", len(events), err)
		}
	}
	if most := 1 + responses/(depth/4); a.posts > most {
		t.Fatalf("%d calls for %d responses, want at most %d", a.posts, responses, most)
	}
}

func TestBadCompletions(t *testing.T) {
	for name, c := range map[string]struct {
		wc   rdma.WC
		want string
	}{
		"flushed":       {rdma.WC{ID: 1, Status: rdma.WCFlushErr}, "flushed"},
		"short":         {rdma.WC{ID: 1, Bytes: 15}, "15 bytes"},
		"unknown":       {rdma.WC{ID: 20, Bytes: 16}, "buffer 20 of 20"},
		"unknown, huge": {rdma.WC{ID: 1 << 63, Bytes: 16}, "of 20"},
	} {
		q, a := newQueue(t, 16)
		a.respond(5)
		a.done = append(a.done, c.wc)
		events, err := q.Poll()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v", name, err)
		}
		if len(events) != 1 || events[0].Completion.CID() != 5 {
			t.Errorf("%s: the response before it was lost", name)
		}
	}
}

func TestInvalidatedKey(t *testing.T) {
	q, a := newQueue(t, 16)
	a.respond(1)
	a.done[0].Flags, a.done[0].InvalidatedKey = rdma.WCWithInvalidate, 0xABCD
	events, err := q.Poll()
	if err != nil || !events[0].Invalidated || events[0].InvalidatedKey != 0xABCD {
		t.Fatalf("%+v, %v", events, err)
	}
}

func TestNoAllocations(t *testing.T) {
	q, a := newQueue(t, 128)
	n := testing.AllocsPerRun(1000, func() {
		for i := range uint16(64) {
			a.respond(i)
		}
		if ev, _ := q.Poll(); len(ev) != 64 {
			t.Fatal("missing responses")
		}
	})
	if n != 0 {
		t.Fatalf("%v allocations per batch", n)
	}
}

func BenchmarkPoll(b *testing.B) {
	q, a := newQueue(b, 128)
	b.ReportAllocs()
	for b.Loop() {
		for i := range uint16(32) {
			a.respond(i)
		}
		q.Poll()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32), "ns/response")
}

// TestCloseOrder checks that a queue that is closed too early stays usable, and that a
// closed queue does no harm.
func TestCloseOrder(t *testing.T) {
	a := new(adapter)
	q, err := New(a, a, Config{Depth: 4})
	if err != nil {
		t.Fatal(err)
	}
	q.Bind(a)
	if err := q.Fill(); err != nil {
		t.Fatal(err)
	}
	a.busy = errBusy
	if err := q.Close(); !errors.Is(err, errBusy) || a.closed != 1 {
		t.Errorf("close in use: %v, %d calls", err, a.closed)
	}
	a.respond(5)
	if events, err := q.Poll(); len(events) != 1 || err != nil {
		t.Errorf("%d events: %v", len(events), err)
	}
	a.busy = nil
	for range 2 {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	a.done = append(a.done, rdma.WC{Bytes: cqeSize, Recv: true})
	if events, err := q.Poll(); len(events) != 0 || !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("%d events: %v", len(events), err)
	}
	if err := q.Fill(); !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("fill: %v", err)
	}
}

var errBusy = errors.New("in use")
