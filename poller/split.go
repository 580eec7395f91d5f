package poller

import "fmt"

// Class is a class of NVMe I/O queues, with the meaning and the names of
// blk-mq's hctx types.
type Class uint8

// Queue classes. A request goes to the queues of one class.
const (
	Default  Class = iota // everything that no other class takes
	Read                  // reads
	Poll                  // busy-polled, what the poll policy sends there
	nClasses = iota
)

// Classes are all classes, in the order in which qids are given out.
var Classes = [nClasses]Class{Default, Read, Poll}

var classNames = [nClasses]string{"default", "read", "poll"}

func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class %d", c)
}

// Request is how many I/O queues the operator asks for, in nvme-cli's terms.
type Request struct {
	IO    int // --nr-io-queues, ≥ 1
	Write int // --nr-write-queues; > 0 separates writes from reads
	Poll  int // --nr-poll-queues
}

// Clip limits each count to the number of CPUs, before anything is split: a
// class with more queues than CPUs has queues that nobody can reach, and
// starves the others.
func (r Request) Clip(cpus int) Request {
	return Request{IO: max(1, min(r.IO, cpus)), Write: max(0, min(r.Write, cpus)), Poll: max(0, min(r.Poll, cpus))}
}

// Total is the number of queues to ask the target for.
func (r Request) Total() int { return r.IO + r.Write + r.Poll }

// Loops is how many loops serve the request: as many as its largest class, so
// that with a full grant no two loops share a queue of any class.
func (r Request) Loops() int { return max(r.IO, r.Write, r.Poll) }

// Plan is a grant split into classes. The queue ids 1..Queues() go to the
// default class first, then read, then poll.
type Plan struct {
	Requested Request // after Clip
	Granted   int     // I/O queues in use: at most what was requested
	Count     [nClasses]int
}

// Split computes from zero how the granted queues are spread; nothing of an
// earlier plan takes part. Priority is read, then default, then poll. req has
// been clipped; granted below 0 counts as 0, and 0 gives a plan without
// queues, with which nothing can be served.
//
// For a fresh connect the numbers are those of Linux' nvmf_set_io_queues
// (drivers/nvme/host/fabrics.h), except that there the old numbers survive a
// reconnect and unclipped counts are split.
func Split(req Request, granted int) Plan {
	g := max(0, min(granted, req.Total()))
	p := Plan{Requested: req, Granted: g}
	if req.Write > 0 && g > req.IO {
		p.Count[Read] = req.IO
		p.Count[Default] = min(req.Write, g-req.IO)
	} else {
		p.Count[Default] = min(req.IO, g)
	}
	p.Count[Poll] = min(req.Poll, g-p.Count[Read]-p.Count[Default])
	return p
}

// Queues is the number of I/O queues of the plan.
func (p Plan) Queues() int { return p.Count[Default] + p.Count[Read] + p.Count[Poll] }

// Mapped is the class whose queues serve the requests of class c: c itself, or
// Default when c has no queue of its own.
func (p Plan) Mapped(c Class) Class {
	if p.Count[c] == 0 {
		return Default
	}
	return c
}

// ClassOf is the class of queue qid, 1 ≤ qid ≤ Queues().
func (p Plan) ClassOf(qid int) Class {
	for _, c := range Classes {
		if qid <= p.Count[c] {
			return c
		}
		qid -= p.Count[c]
	}
	panic(fmt.Sprintf("poller: qid %d beyond the plan", qid))
}

// first is the number of queues before the first one of class c.
func (p Plan) first(c Class) int {
	n := 0
	for _, d := range Classes {
		if d == c {
			return n
		}
		n += p.Count[d]
	}
	return n
}

// RequestedOf is how many queues of class c were asked for. Reads have queues
// of their own only if write queues were asked for.
func (p Plan) RequestedOf(c Class) int {
	switch {
	case c == Poll:
		return p.Requested.Poll
	case p.Requested.Write == 0 && c == Default:
		return p.Requested.IO
	case p.Requested.Write == 0:
		return 0
	case c == Default:
		return p.Requested.Write
	default:
		return p.Requested.IO
	}
}

// Assignment is what an association does with its grant: the queues of each class,
// which loop drives each queue, and which queue serves each loop. It is computed
// once, by Assign.
type Assignment struct {
	Plan
	Mapping
}

// Assign splits the granted queues into classes (Split) and spreads them over the
// loops (Map). req has been clipped; loops is at least req.Loops().
func Assign(req Request, granted, loops int) Assignment {
	p := Split(req, granted)
	return Assignment{Plan: p, Mapping: Map(p, loops)}
}

// OwnerOf is the loop that drives queue qid, 1 ≤ qid ≤ Queues().
func (a *Assignment) OwnerOf(qid int) int { return a.Owner[qid-1] }

// QueueOf is the queue to which loop l sends requests of class c, and whether the
// loop must hand them over to another one, which drives that queue. The plan has
// at least one queue.
func (a *Assignment) QueueOf(l int, c Class) (qid int, handOver bool) {
	qid = a.Queue[l][c]
	return qid, a.Owner[qid-1] != l
}

func (p Plan) String() string {
	return fmt.Sprintf("%d/%d/%d default/read/poll queues of %d granted, %d requested",
		p.Count[Default], p.Count[Read], p.Count[Poll], p.Granted, p.Requested.Total())
}

// Mapping says which queue serves whom: Queue[l][c] is the qid to which loop l
// sends requests of class c, and Owner[qid-1] the loop that drives queue qid.
// Where Owner[Queue[l][c]-1] != l, loop l hands its requests over.
type Mapping struct {
	Queue [][nClasses]int
	Owner []int
}

// Map spreads the queues of a plan over loops, at least as many as the largest
// class of the plan has queues (Request.Loops is enough for every grant). Every queue gets one owner;
// every class of every loop gets a queue as long as the plan has one. Queues of
// different classes start at different loops, so that when each class has
// fewer queues than there are loops, the load does not pile up on the first.
func Map(p Plan, loops int) Mapping {
	m := Mapping{Queue: make([][nClasses]int, loops), Owner: make([]int, p.Queues())}
	if p.Queues() == 0 {
		return m
	}
	start := 0
	for _, c := range Classes {
		n := p.Count[c]
		if n == 0 {
			continue
		}
		for i := range n {
			m.Owner[p.first(c)+i] = (start + i) % loops
		}
		for l := range loops {
			// The queue that loop l owns, or the one that its turn falls on.
			m.Queue[l][c] = p.first(c) + ((l-start)%loops+loops)%loops%n + 1
		}
		if n < loops {
			start = (start + n) % loops
		}
	}
	for l := range m.Queue {
		for c := range m.Queue[l] {
			if p.Count[c] == 0 {
				m.Queue[l][c] = m.Queue[l][Default]
			}
		}
	}
	return m
}
