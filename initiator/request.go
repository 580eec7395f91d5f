package initiator

import (
	"math"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// request is one I/O in progress. It belongs to the lane that works on it; the inbox
// passes it from one lane to another. A namespace queue has one request per tag, which it
// reuses.
type request struct {
	next   *request // in a fifo or an inbox
	home   *nsQueue
	via    *queuePair // for which the request is in an inbox
	io     block.Request
	data   *slab  // memory of the data
	at     uint64 // of the data in it
	class  poller.Class
	errno  uint16
	status nvme.Status // what the target said of a request that fails; 0: nothing
	tries  uint8       // commands that failed with a status that counts as a try
	done   bool        // the result is in the inbox of the home lane

	submitted bool         // between Submit and Reap
	inRegion  bool         // data is a region, or the first of several, whose users count the request
	timed     bool         // timing is in use
	progress  uint32       // sectors that earlier commands over assoc transferred
	sent      uint32       // sectors of the command in flight
	assoc     *association // association of progress
	posted    uint32       // Subsystem.clock when the command was sent
	timing    timing

	// The fields below are for requests in trouble. troubled is set if any of them is,
	// so that the hot path checks only one field.
	troubled  bool
	direct    *direct       // the command of an opDirect; nil: the request is of a front end
	losses    uint8         // associations that were lost with the request in flight
	blames    uint8         // losses in which the request was the only suspect
	firstLoss time.Duration // time of the first loss, on Subsystem.now's clock
	due       time.Duration // earliest time to send the request; 0: at once
	pathSince time.Duration // time of the first of a series of path errors; 0: none
	avoid     uint16        // slots of the paths that answered with a path error, one bit each
}

// begin starts a new I/O of a front end. Its data is in the buffer of its tag.
func (r *request) begin(io block.Request) {
	r.io = io
	r.data, r.at = r.home.buffers.chunk(io.Tag)
	r.errno, r.status, r.tries, r.sent, r.assoc, r.timed = 0, 0, 0, 0, nil, false
	if r.troubled {
		r.troubled, r.losses, r.blames, r.firstLoss, r.due, r.pathSince, r.avoid = false, 0, 0, 0, 0, 0, 0
	}
}

// Limits for requests that were in flight when associations were lost.
const (
	// After suspectLosses losses a request is a suspect: it may be the cause of the
	// losses. Suspects are sent one at a time.
	suspectLosses = 2
	// minBlames is the number of associations that must be lost with a request as the
	// only suspect in flight before the request fails.
	minBlames = 3
	// blamePause is the time before a suspect is sent again. It doubles with each blame,
	// up to blamePauseMax, so that other suspects come first and requests that are not
	// suspects proceed meanwhile.
	blamePause    = 100 * time.Millisecond
	blamePauseMax = 5 * time.Second
)

func (r *request) suspect() bool { return r.losses >= suspectLosses }

// blame counts an association that was lost with the request in flight, and reports
// whether the request must fail.
func (c *Controller) blame(r *request) (fail bool) {
	s := c.sub
	if r.losses == 0 {
		r.firstLoss = s.now()
	}
	r.troubled = true
	if r.losses < math.MaxUint8 {
		r.losses++
	}
	if !s.suspect.CompareAndSwap(r, nil) {
		return false
	}
	c.blamed.Store(true)
	if r.blames < math.MaxUint8 {
		r.blames++
	}
	r.due = s.now() + min(blamePause<<min(r.blames, 16), blamePauseMax)
	return r.blames >= minBlames && s.now()-r.firstLoss >= s.blameTime()
}

// blameTime returns the time for which a request may at least go on to end associations.
// It is short enough that other requests do not fail before.
func (s *Subsystem) blameTime() time.Duration {
	limit := s.cfg.IOTimeout
	if loss, bounded := s.lossTime(); bounded {
		limit = min(limit, loss/2)
	}
	return limit
}

// maxRetries is the number of times that a command is sent again after an error status
// without Do Not Retry (nvme_core.max_retries).
const maxRetries = 5

// pathRetryDelay is the time before a command that failed with a path error is sent again.
const pathRetryDelay = 200 * time.Millisecond

// mayRetry reports whether a command that failed with an error status is sent again.
// Retries after path errors are limited by time, like those after the loss of the
// association, and do not count as tries.
func (c *Controller) mayRetry(a *association, r *request, s nvme.Status) bool {
	switch {
	case s.DNR():
		return false
	case !s.IsPathError():
		r.tries++
		return r.tries <= maxRetries
	}
	now := c.sub.now()
	if r.pathSince == 0 {
		r.troubled, r.pathSince = true, now
	}
	limit, bounded := c.sub.lossTime()
	if s.IsANAError() {
		limit += time.Duration(a.identify.ANATT()) * time.Second
	}
	return !bounded || now-r.pathSince < limit
}

// retryDelay returns the time that the target requests before a command is sent again. It
// is at most the I/O timeout, because a controller can request almost two hours.
func (c *Controller) retryDelay(a *association, s nvme.Status) time.Duration {
	delay := time.Duration(a.identify.CRDT(s.CRD())) * 100 * time.Millisecond
	if delay == 0 && s.IsPathError() {
		delay = pathRetryDelay
	}
	return min(delay, c.cfg.IOTimeout)
}

// lossTime returns how long a request may wait for a path to its namespace. If bounded is
// false, the request may wait forever.
func (s *Subsystem) lossTime() (limit time.Duration, bounded bool) {
	switch {
	case s.cfg.FastIOFail > 0:
		return s.cfg.FastIOFail, true
	case s.cfg.CtrlLoss > 0:
		return s.cfg.CtrlLoss, true
	}
	return 0, false
}

// fifo is an intrusive list of requests.
type fifo struct{ head, tail *request }

func (f *fifo) push(r *request) {
	r.next = nil
	if f.tail == nil {
		f.head = r
	} else {
		f.tail.next = r
	}
	f.tail = r
}

func (f *fifo) pop() *request {
	r := f.head
	if r == nil {
		return nil
	}
	if f.head = r.next; f.head == nil {
		f.tail = nil
	}
	return r
}

// unpop puts back what pop returned.
func (f *fifo) unpop(r *request) {
	if r.next = f.head; f.head == nil {
		f.tail = r
	}
	f.head = r
}

// take empties the list and returns its contents.
func (f *fifo) take() fifo {
	all := *f
	*f = fifo{}
	return all
}
