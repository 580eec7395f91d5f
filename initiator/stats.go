package initiator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
)

// LossReason is the kind of event that ended an association.
type LossReason uint8

// Loss reasons. The set is closed, so that a counter per reason can be exported.
const (
	LossOther          LossReason = iota // none of the reasons below
	LossKeepAlive                        // a Keep Alive command failed or was not answered
	LossCommandTimeout                   // another command was not answered in time
	LossQueuePair                        // a queue pair or its completion queue failed
	LossProtocol                         // a response matched no command in flight, or named a key or a queue entry that it must not
	LossDisconnected                     // the connection manager reported the end of a connection
	LossDeviceRemoved                    // the RDMA device went away
	LossTargetError                      // the target reported a persistent internal error
	LossAborted                          // Abort was called
	LossReset                            // Reset was called
	LossLinkDown                         // the link is down, and there is another path
	LossANA                              // an ANA group was in transition for too long
	nLossReasons
)

var lossReasons = [nLossReasons]string{
	"other", "keep_alive", "command_timeout", "queue_pair", "protocol", "disconnected", "device_removed", "target_error", "aborted", "reset", "link_down", "ana_transition",
}

func (r LossReason) String() string {
	if r < nLossReasons {
		return lossReasons[r]
	}
	return fmt.Sprintf("reason %d", r)
}

// lossError is an error with the reason that it is counted as.
type lossError struct {
	reason LossReason
	error
}

func (e *lossError) Unwrap() error { return e.error }

// because says what the loss of an association by err is counted as.
func because(reason LossReason, err error) error { return &lossError{reason, err} }

// reasonOf returns the reason for the loss of an association. If because was called several
// times, the call closest to the cause counts.
func (c *Controller) reasonOf(err error) LossReason {
	if cause := context.Cause(c.life); cause != nil && errors.Is(err, cause) {
		return LossAborted
	}
	reason := LossOther
	for e := (*lossError)(nil); errors.As(err, &e); err = e.error {
		reason = e.reason
	}
	return reason
}

// Stage is a part of the time that a request takes.
type Stage uint8

// Stages. Their times add up to that of the whole request.
const (
	// StageQueue: the request waits for a slot in a queue pair, is on its way to the
	// loop that sends it, or is held because it cannot be sent.
	StageQueue Stage = iota
	// StageWire: a command of the request is with the target. It begins when the command
	// is written into its capsule and ends when the response is taken.
	StageWire
	// StageReturn: the response has been taken, and the result is on its way to the front
	// end. A request with data in its capsule waits for the completion of its SEND.
	StageReturn
	nStages
)

var stageNames = [nStages]string{"queue", "wire", "return"}

func (s Stage) String() string {
	if s < nStages {
		return stageNames[s]
	}
	return fmt.Sprintf("stage %d", s)
}

// durationBounds are the upper bounds of the buckets of a Histogram.
var durationBounds = [...]time.Duration{
	10 * time.Microsecond, 20 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 200 * time.Microsecond, 500 * time.Microsecond,
	1 * time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond,
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	1 * time.Second, 2 * time.Second, 5 * time.Second,
	10 * time.Second, 30 * time.Second, 60 * time.Second,
}

// DurationBounds returns the upper bounds of the buckets of a Histogram, in ascending
// order.
func DurationBounds() []time.Duration { return slices.Clone(durationBounds[:]) }

// Histogram is a distribution of durations. Buckets has one more element than
// DurationBounds: the durations beyond the last bound.
type Histogram struct {
	Buckets [len(durationBounds) + 1]uint64 // not cumulative
	Sum     time.Duration
}

// Count returns the number of durations.
func (h *Histogram) Count() uint64 {
	n := uint64(0)
	for _, b := range h.Buckets {
		n += b
	}
	return n
}

// nOps is the number of operations, including block.OpUnset.
const nOps = int(block.OpWriteZeroes) + 1

// OpHistograms are histograms by block.Op.
type OpHistograms [nOps]Histogram

// histogram is a Histogram that one loop writes and any goroutine reads.
type histogram struct {
	buckets [len(durationBounds) + 1]atomic.Uint64
	sum     atomic.Int64 // nanoseconds
}

// add counts a duration. Only the loop may call it.
func (h *histogram) add(d time.Duration) {
	i := 0
	for i < len(durationBounds) && d > durationBounds[i] {
		i++
	}
	h.buckets[i].Store(h.buckets[i].Load() + 1)
	h.sum.Store(h.sum.Load() + int64(d))
}

func (h *histogram) addTo(sum *Histogram) {
	for i := range h.buckets {
		sum.Buckets[i] += h.buckets[i].Load()
	}
	sum.Sum += time.Duration(h.sum.Load())
}

// opHistograms are histograms by block.Op.
type opHistograms [nOps]histogram

func (h *opHistograms) addTo(sum *OpHistograms) {
	for op := range h {
		h[op].addTo(&sum[op])
	}
}

// SampleInterval is the mean number of requests of which one is timed.
//
// A stamp for each pass of a loop would time all requests, but at low queue depth a pass
// serves one request, so it would read the clock several times for each of them. Sampling
// reads it at most four times for each request that is timed, whatever the load is.
const SampleInterval = 64

// sampler chooses the requests that are timed. The distance between two of them is
// random, so that no pattern of the load is missed. If few requests come, one is timed in
// each second in which the controller is live.
type sampler struct {
	skip   uint32 // number of requests until the next sample
	random uint32 // state of a xorshift generator; 0 before the first sample
	second uint32 // Controller.clock at the last sample
}

// sample reports whether the next request is timed.
func (s *sampler) sample(second uint32) bool {
	if s.skip > 0 && s.second == second {
		s.skip--
		return false
	}
	if s.random == 0 {
		s.random = 0x9E3779B9
	}
	s.random ^= s.random << 13
	s.random ^= s.random >> 17
	s.random ^= s.random << 5
	s.skip, s.second = s.random%(2*SampleInterval-1), second
	return true
}

// timing is what is known of the times of a request that is timed. Times are on
// Controller.now's clock.
type timing struct {
	began    time.Duration // when the front end submitted the request
	pushed   time.Duration // when its last command was written; 0: no command is in flight
	answered time.Duration // when the response to its last command was taken; 0: there is none
	wire     time.Duration // total time of its commands that were answered
}

// stamp reads the clock for a request that is timed. Every reading of the data path goes
// through it.
func (l *lane) stamp() time.Duration {
	l.stamps++
	return max(1, l.sub.now())
}

// record adds the times of a request that ends to the histograms. The request's home is on
// this lane.
func (l *lane) record(r *request) {
	t, now := &r.timing, l.stamp()
	back := time.Duration(0)
	if t.answered > 0 {
		back = now - t.answered
	}
	op := r.io.Op
	l.stages[StageQueue][op].add(now - t.began - t.wire - back)
	l.stages[StageWire][op].add(t.wire)
	l.stages[StageReturn][op].add(back)
	r.home.times[op].add(now - t.began)
}

// Durations returns how long requests of the namespace took, from Submit to Reap. Only
// the requests that were timed are counted, about one in SampleInterval. Any goroutine
// may call it.
func (ns *Namespace) Durations() OpHistograms {
	var sum OpHistograms
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for _, h := range ns.times {
		if h != nil {
			h.addTo(&sum)
		}
	}
	return sum
}

// timesOn returns the histograms of the namespace that a lane writes. They outlive the
// queues of the namespace.
func (ns *Namespace) timesOn(lane int) *opHistograms {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.times == nil {
		ns.times = make([]*opHistograms, len(ns.sub.lanes))
	}
	if ns.times[lane] == nil {
		ns.times[lane] = new(opHistograms)
	}
	return ns.times[lane]
}

// Present reports whether the namespace was found over a present association, so that
// its requests are sent. Any goroutine may call it.
func (ns *Namespace) Present() bool { return ns.presence.Load() == served }

// outages counts the time without an association.
type outages struct {
	total time.Duration // of the outages that have ended
	since time.Time     // start of the present one; zero: there is none
	made  int           // associations made again
	tries int           // attempts to make one again
	lost  [nLossReasons]int
}

func (o *outages) begin(when time.Time) {
	if o.since.IsZero() {
		o.since = when
	}
}

func (o *outages) end(when time.Time) {
	if o.since.IsZero() {
		return // the first association
	}
	o.total += when.Sub(o.since)
	o.since = time.Time{}
	o.made++
}

// time returns the total duration of all outages.
func (o *outages) time() time.Duration {
	if o.since.IsZero() {
		return o.total
	}
	return o.total + time.Since(o.since)
}
