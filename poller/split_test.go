package poller

import (
	"reflect"
	"testing"
)

// TestSplitExhaustive checks the contract of Split for every request and grant of a
// useful range.
func TestSplitExhaustive(t *testing.T) {
	for i := 1; i <= 8; i++ {
		for w := 0; w <= 8; w++ {
			for p := 0; p <= 8; p++ {
				req := Request{IO: i, Write: w, Poll: p}
				for g := -1; g <= req.Total()+2; g++ {
					checkPlan(t, req, g)
				}
			}
		}
	}
}

func checkPlan(t *testing.T, req Request, g int) {
	t.Helper()
	plan := Split(req, g)
	usable := max(0, min(g, req.Total()))
	if plan.Queues() != usable {
		t.Fatalf("%+v grant %d: %d queues in use, want %d", req, g, plan.Queues(), usable)
	}
	for _, c := range Classes {
		if plan.Count[c] < 0 || plan.Count[c] > plan.RequestedOf(c) && !(c == Default && plan.Count[Read] == 0 && plan.Count[c] <= req.IO) {
			t.Fatalf("%+v grant %d: class %v has %d queues, requested %d", req, g, c, plan.Count[c], plan.RequestedOf(c))
		}
	}
	wantD, wantR, wantP := kernelSplit(req, usable)
	if plan.Count[Default] != wantD || plan.Count[Read] != wantR || plan.Count[Poll] != wantP {
		t.Fatalf("%+v grant %d: got %v, want %d/%d/%d", req, g, plan, wantD, wantR, wantP)
	}
	checkMap(t, plan, req.Loops())
}

// kernelSplit makes the decisions of Linux' nvmf_set_io_queues in the same order, with
// counts that start at zero.
func kernelSplit(req Request, g int) (def, read, poll int) {
	left := g
	if req.Write > 0 && req.IO < left {
		read = req.IO
		left -= read
		def = min(req.Write, left)
	} else {
		def = min(req.IO, left)
	}
	left -= def
	if req.Poll > 0 && left > 0 {
		poll = min(req.Poll, left)
	}
	return def, read, poll
}

func checkMap(t *testing.T, plan Plan, loops int) {
	t.Helper()
	m := Map(plan, loops)
	if len(m.Queue) != loops || len(m.Owner) != plan.Queues() {
		t.Fatalf("%v over %d loops: mapping of wrong size", plan, loops)
	}
	if plan.Queues() == 0 {
		return
	}
	used := make([]bool, plan.Queues()+1)
	owned := make(map[[2]int]int)
	for l := range loops {
		for _, c := range Classes {
			q := m.Queue[l][c]
			if q < 1 || q > plan.Queues() {
				t.Fatalf("%v over %d loops: loop %d class %v maps to queue %d, which does not exist", plan, loops, l, c, q)
			}
			if got := plan.ClassOf(q); got != plan.Mapped(c) {
				t.Fatalf("%v over %d loops: loop %d class %v maps to queue %d of class %v", plan, loops, l, c, q, got)
			}
			used[q] = true
		}
	}
	for q := 1; q <= plan.Queues(); q++ {
		owner, class := m.Owner[q-1], plan.ClassOf(q)
		if !used[q] {
			t.Fatalf("%v over %d loops: queue %d is granted and unused", plan, loops, q)
		}
		if owner < 0 || owner >= loops || m.Queue[owner][class] != q {
			t.Fatalf("%v over %d loops: owner %d of queue %d does not use it", plan, loops, owner, q)
		}
		if n := owned[[2]int{owner, int(class)}]; n > 0 {
			t.Fatalf("%v over %d loops: loop %d owns two queues of class %v", plan, loops, owner, class)
		}
		owned[[2]int{owner, int(class)}]++
	}
	for _, c := range Classes {
		if plan.Count[c] != loops {
			continue
		}
		for l := range loops {
			if m.Owner[m.Queue[l][c]-1] != l {
				t.Fatalf("%v: class %v has a queue for each of %d loops, yet loop %d does not own its own", plan, c, loops, l)
			}
		}
	}
}

// TestRegrant goes from every grant to every other one. The plan after a reconnect is
// that of a first connect, and the loops stay.
func TestRegrant(t *testing.T) {
	for i := 1; i <= 4; i++ {
		for w := 0; w <= 4; w++ {
			for p := 0; p <= 4; p++ {
				req := Request{IO: i, Write: w, Poll: p}
				for g := 1; g <= req.Total(); g++ {
					first := Split(req, g)
					for h := 0; h <= req.Total(); h++ {
						again := Split(first.Requested, h)
						if again != Split(req, h) {
							t.Fatalf("%+v: grant %d after %d gives %v", req, h, g, again)
						}
						checkMap(t, again, req.Loops())
					}
				}
			}
		}
	}
}

// TestSplitWorkedTable has rows that Linux was seen to report for a first connect on 4
// CPUs. Where Linux is wrong, the rows have our numbers.
func TestSplitWorkedTable(t *testing.T) {
	for _, row := range []struct {
		asked            Request
		granted          int
		read, deflt, pol int
	}{
		{Request{4, 0, 0}, 128, 0, 4, 0},
		{Request{4, 0, 0}, 1, 0, 1, 0},
		{Request{2, 2, 2}, 128, 2, 2, 2},
		{Request{2, 2, 2}, 5, 2, 2, 1},
		{Request{2, 2, 2}, 4, 2, 2, 0},
		{Request{2, 2, 2}, 3, 2, 1, 0},
		{Request{2, 2, 2}, 2, 0, 2, 0},
		{Request{2, 2, 2}, 1, 0, 1, 0},
		{Request{4, 0, 2}, 5, 0, 4, 1},
		{Request{4, 0, 2}, 2, 0, 2, 0},
		{Request{4, 4, 0}, 8, 4, 4, 0},
		{Request{4, 4, 0}, 5, 4, 1, 0},
		{Request{4, 4, 0}, 4, 0, 4, 0},
		{Request{1, 1, 1}, 3, 1, 1, 1},
		{Request{4, 6, 1}, 9, 4, 4, 1},  // Linux: 4/5/0, poll starved
		{Request{4, 8, 2}, 10, 4, 4, 2}, // Linux: connect fails
		{Request{4, 0, 6}, 8, 0, 4, 4},
	} {
		p := Split(row.asked.Clip(4), row.granted)
		if p.Count[Read] != row.read || p.Count[Default] != row.deflt || p.Count[Poll] != row.pol {
			t.Errorf("%+v granted %d: got %v, want read %d default %d poll %d", row.asked, row.granted, p, row.read, row.deflt, row.pol)
		}
	}
}

// TestAssign checks that the assignment is that of Split and Map, and is consistent.
func TestAssign(t *testing.T) {
	for io := 1; io <= 4; io++ {
		for write := range 5 {
			for poll := range 5 {
				req := Request{IO: io, Write: write, Poll: poll}
				for granted := range req.Total() + 2 {
					loops := req.Loops()
					a := Assign(req, granted, loops)
					if p := Split(req, granted); a.Plan != p || !reflect.DeepEqual(a.Mapping, Map(p, loops)) {
						t.Fatalf("%+v, %d granted: %+v", req, granted, a)
					}
					if granted == 0 {
						continue
					}
					for l := range loops {
						for _, c := range Classes {
							qid, over := a.QueueOf(l, c)
							if got := a.ClassOf(qid); got != a.Mapped(c) || over != (a.OwnerOf(qid) != l) {
								t.Fatalf("%+v, %d granted: loop %d sends %s to queue %d, which is %s's, owned by %d, handed over %v",
									req, granted, l, c, qid, got, a.OwnerOf(qid), over)
							}
						}
					}
				}
			}
		}
	}
}

// TestRotate checks that a rotated mapping has the same queues on other loops.
func TestRotate(t *testing.T) {
	for loops := 1; loops <= 4; loops++ {
		m := Map(Split(Request{IO: loops, Write: 1}, loops), loops)
		for n := range 6 {
			r := m.Rotate(n)
			for l := range loops {
				if r.Queue[(l+n)%loops] != m.Queue[l] {
					t.Errorf("%d loops by %d: loop %d has queues %v, want %v", loops, n, (l+n)%loops, r.Queue[(l+n)%loops], m.Queue[l])
				}
			}
			for q, owner := range m.Owner {
				if r.Owner[q] != (owner+n)%loops {
					t.Errorf("%d loops by %d: queue %d has owner %d", loops, n, q+1, r.Owner[q])
				}
			}
		}
	}
}
