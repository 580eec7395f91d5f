package initiator

import (
	"math"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// request is one I/O on its way. Its owner is the lane that works on it; the
// inbox passes it from one lane to another. A namespace queue has one per tag,
// for ever.
type request struct {
	next  *request // in a fifo or an inbox
	home  *nsQueue
	io    block.Request
	class poller.Class
	errno uint16
	tries uint8 // commands that ended with an error status that counts
	done  bool  // the result is on its way home

	submitted bool         // between Submit and Reap
	progress  uint32       // sectors that earlier commands over the association transferred
	sent      uint32       // sectors of the command that is in flight
	assoc     *association // that progress belongs to
	posted    uint32       // Controller.clock when the command was sent

	// What follows is for requests in trouble. troubled says that one of the
	// fields is set, so that the others need not be looked at on the hot path.
	troubled  bool
	losses    uint8         // associations that were lost with the request in flight
	blames    uint8         // those in which it was the only suspect
	firstLoss time.Duration // of losses; on Controller.now's clock
	due       time.Duration // not to be sent before; 0: at once
	pathSince time.Duration // first of a series of path related statuses; 0: none
}

// begin takes a new I/O from a front end.
func (r *request) begin(io block.Request) {
	r.io = io
	r.errno, r.tries, r.sent, r.assoc = 0, 0, 0, nil
	if r.troubled {
		r.troubled, r.losses, r.blames, r.firstLoss, r.due, r.pathSince = false, 0, 0, 0, 0, 0
	}
}

// Requests that were in flight when associations were lost.
const (
	// suspectLosses makes a request a suspect: it may be what ends the
	// associations. Suspects are sent one at a time.
	suspectLosses = 2
	// minBlames is how many associations have to be lost with a request as the only
	// suspect in flight before it fails for that.
	minBlames = 3
	// blamePause is the time before a suspect is sent once more. It doubles with each
	// blame, up to blamePauseMax, so that the other suspects come first, and others
	// have the target to themselves meanwhile.
	blamePause    = 100 * time.Millisecond
	blamePauseMax = 5 * time.Second
)

func (r *request) suspect() bool { return r.losses >= suspectLosses }

// blame counts an association that was lost with the request in flight, and says
// whether the request has to fail for it.
func (c *Controller) blame(r *request) (fail bool) {
	if r.losses == 0 {
		r.firstLoss = c.now()
	}
	r.troubled = true
	if r.losses < math.MaxUint8 {
		r.losses++
	}
	if !c.suspect.CompareAndSwap(r, nil) {
		return false
	}
	c.blamed.Store(true)
	if r.blames < math.MaxUint8 {
		r.blames++
	}
	r.due = c.now() + min(blamePause<<min(r.blames, 16), blamePauseMax)
	return r.blames >= minBlames && c.now()-r.firstLoss >= c.blameTime()
}

// blameTime is how long a request at least may end associations. Others must not fail
// for it before.
func (c *Controller) blameTime() time.Duration {
	limit := c.cfg.IOTimeout
	if loss, bounded := c.lossTime(); bounded {
		limit = min(limit, loss/2)
	}
	return limit
}

// maxRetries bounds how often a command is sent again after an error status
// without Do Not Retry (nvme_core.max_retries).
const maxRetries = 5

// pathRetryDelay is the time until a command is sent again that failed for a
// reason on the way to the namespace.
const pathRetryDelay = 200 * time.Millisecond

// mayRetry says whether a command that ended with an error status is sent again.
// Statuses that blame the path to the namespace are bounded by time, as the loss
// of the association is, and do not count as tries.
func (c *Controller) mayRetry(a *association, r *request, s nvme.Status) bool {
	switch {
	case s.DNR():
		return false
	case !s.IsPathError():
		r.tries++
		return r.tries <= maxRetries
	}
	now := c.now()
	if r.pathSince == 0 {
		r.troubled, r.pathSince = true, now
	}
	limit, bounded := c.lossTime()
	if s.IsANAError() {
		limit += time.Duration(a.identify.ANATT()) * time.Second
	}
	return !bounded || now-r.pathSince < limit
}

// retryDelay is the time that a target asks for before a command is sent again.
// It is at most the I/O timeout: a controller can ask for almost two hours.
func (c *Controller) retryDelay(a *association, s nvme.Status) time.Duration {
	delay := time.Duration(a.identify.CRDT(s.CRD())) * 100 * time.Millisecond
	if delay == 0 && s.IsPathError() {
		delay = pathRetryDelay
	}
	return min(delay, c.cfg.IOTimeout)
}

// lossTime is how long a request may wait for a path to its namespace; bounded is
// false for ever.
func (c *Controller) lossTime() (limit time.Duration, bounded bool) {
	switch {
	case c.cfg.FastIOFail > 0:
		return c.cfg.FastIOFail, true
	case c.cfg.CtrlLoss > 0:
		return c.cfg.CtrlLoss, true
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

// take empties the list and returns what was in it.
func (f *fifo) take() fifo {
	all := *f
	*f = fifo{}
	return all
}
