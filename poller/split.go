package poller

import "fmt"

// Class is a class of NVMe I/O queues, with the meaning and the names of blk-mq's hctx
// types.
type Class uint8

// Queue classes. A request goes to the queues of one class.
const (
	Default  Class = iota // requests of no other class
	Read                  // reads
	Poll                  // busy-polled; the requests that the poll policy selects
	nClasses = iota
)

// Classes holds all classes in the order in which queue ids are assigned.
var Classes = [nClasses]Class{Default, Read, Poll}

var classNames = [nClasses]string{"default", "read", "poll"}

func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class %d", c)
}

// Request is the number of I/O queues that the operator asks for, in the terms of
// nvme-cli.
type Request struct {
	IO    int // --nr-io-queues, ≥ 1
	Write int // --nr-write-queues; > 0 separates writes from reads
	Poll  int // --nr-poll-queues
}

// Clip limits each count to the number of CPUs. It must be used before Split, because a
// class with more queues than CPUs has queues that no CPU can reach, and takes queues
// from the other classes.
func (r Request) Clip(cpus int) Request {
	return Request{IO: max(1, min(r.IO, cpus)), Write: max(0, min(r.Write, cpus)), Poll: max(0, min(r.Poll, cpus))}
}

// Total returns the number of queues to request from the target.
func (r Request) Total() int { return r.IO + r.Write + r.Poll }

// Loops returns the number of loops that serve the request. It is the size of the largest
// class, so that with a full grant no two loops share a queue of any class.
func (r Request) Loops() int { return max(r.IO, r.Write, r.Poll) }

// Plan is a grant that was split into classes. The queue ids 1..Queues() are assigned to
// the default class first, then to read, then to poll.
type Plan struct {
	Requested Request // after Clip
	Granted   int     // number of I/O queues in use, at most the number requested
	Count     [nClasses]int
}

// Split splits the granted queues into classes. It does not depend on an earlier plan.
// The priority is read, then default, then poll. req must have been clipped. A negative
// granted counts as 0. With 0, the plan has no queues and can serve nothing.
//
// For a first connect, the numbers are those of Linux' nvmf_set_io_queues
// (drivers/nvme/host/fabrics.h). Linux differs in that old numbers survive a reconnect,
// and that unclipped counts are split.
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

// Queues returns the number of I/O queues of the plan.
func (p Plan) Queues() int { return p.Count[Default] + p.Count[Read] + p.Count[Poll] }

// Mapped returns the class whose queues serve the requests of class c. It is c itself, or
// Default if c has no queues.
func (p Plan) Mapped(c Class) Class {
	if p.Count[c] == 0 {
		return Default
	}
	return c
}

// ClassOf returns the class of queue qid, 1 ≤ qid ≤ Queues().
func (p Plan) ClassOf(qid int) Class {
	for _, c := range Classes {
		if qid <= p.Count[c] {
			return c
		}
		qid -= p.Count[c]
	}
	panic(fmt.Sprintf("poller: qid %d beyond the plan", qid))
}

// first returns the number of queues before the first one of class c.
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

// RequestedOf returns the number of queues of class c that were requested. Reads have
// queues of their own only if write queues were requested.
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

// Assignment is the use of a grant by an association: the queues of each class, the loop
// that drives each queue, and the queue that serves each class of each loop. Assign
// computes it.
type Assignment struct {
	Plan
	Mapping
}

// Assign splits the granted queues into classes (Split) and distributes them over the
// loops (Map). req must have been clipped, and loops must be at least req.Loops().
func Assign(req Request, granted, loops int) Assignment {
	p := Split(req, granted)
	return Assignment{Plan: p, Mapping: Map(p, loops)}
}

// OwnerOf returns the loop that drives queue qid, 1 ≤ qid ≤ Queues().
func (a *Assignment) OwnerOf(qid int) int { return a.Owner[qid-1] }

// QueueOf returns the queue to which loop l sends requests of class c. handOver reports
// whether another loop drives that queue, so that the requests must be handed over to it.
// The plan must have at least one queue.
func (a *Assignment) QueueOf(l int, c Class) (qid int, handOver bool) {
	qid = a.Queue[l][c]
	return qid, a.Owner[qid-1] != l
}

func (p Plan) String() string {
	return fmt.Sprintf("%d/%d/%d default/read/poll queues of %d granted, %d requested",
		p.Count[Default], p.Count[Read], p.Count[Poll], p.Granted, p.Requested.Total())
}

// Mapping assigns queues to loops. Queue[l][c] is the qid to which loop l sends requests
// of class c, and Owner[qid-1] is the loop that drives queue qid. If Owner[Queue[l][c]-1]
// != l, loop l hands its requests over.
type Mapping struct {
	Queue [][nClasses]int
	Owner []int
}

// Map distributes the queues of a plan over loops. There must be at least as many loops
// as the largest class of the plan has queues; Request.Loops is enough for every grant.
// Every queue gets one owner. Every class of every loop gets a queue if the plan has one.
// Queues of different classes start at different loops. So if each class has fewer queues
// than there are loops, the load is not concentrated on the first loops.
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
			// The queue that loop l owns, or the next one in turn
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

// Rotate returns the mapping with every loop replaced by the one n places further. Several
// mappings over the same loops then do not concentrate the load on the first loops.
func (m Mapping) Rotate(n int) Mapping {
	loops := len(m.Queue)
	out := Mapping{Queue: make([][nClasses]int, loops), Owner: make([]int, len(m.Owner))}
	for l := range loops {
		out.Queue[(l+n)%loops] = m.Queue[l]
	}
	for i, l := range m.Owner {
		out.Owner[i] = (l + n) % loops
	}
	return out
}
