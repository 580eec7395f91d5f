package target

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
)

const (
	aerLimit         = 4                 // asynchronous event requests at a time
	keepAliveUnit    = 10                // KAS, in 100 ms
	discoveryTimeout = 120 * time.Second // of a discovery controller that asked for none
	readyTimeout     = 15                // CAP.TO and CRTO, in 500 ms
)

// event is what an asynchronous event tells of.
type event uint8

const (
	eventUnset event = iota
	eventNamespace
	eventANA
	eventDiscovery
	numEvents
)

// events are the AEN bit, the completion and the log page of each event.
var events = [numEvents]struct {
	enable uint32
	dw0    nvme.AsyncEvent
	log    uint8
}{
	eventNamespace: {nvme.AENNamespaceAttribute, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeNamespaceChanged, nvme.LogChangedNamespaces), nvme.LogChangedNamespaces},
	eventANA:       {nvme.AENANAChange, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeANAChanged, nvme.LogANA), nvme.LogANA},
	eventDiscovery: {nvme.AENDiscoveryChange, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeDiscoveryChanged, nvme.LogDiscovery), nvme.LogDiscovery},
}

// controller is what a host got by the Connect of its admin queue. With that
// queue it ends, and it is known, so that its id names it, until all its queues
// have left. A queue leaves when it executes no command and never will again.
type controller struct {
	subsystem *Subsystem
	id        uint16
	hostNQN   string
	hostID    nvme.UUID

	ready    atomic.Bool // CSTS.RDY, read by every command
	alive    atomic.Bool // a command came since the keep alive timer was set
	cacheOff atomic.Bool // the host turned the volatile write cache off

	mu       sync.Mutex // guards what follows
	queues   map[uint16]*queue
	ended    bool // no queue may join
	stopping stop // what waits for the I/O queues to leave
	cc       nvme.CC
	csts     nvme.CSTS
	granted  int // I/O queues
	kato     time.Duration
	timer    *time.Timer     // of the keep alive
	enabled  uint32          // AEN bits
	masked   [numEvents]bool // told of and not read since
	waiting  []event         // to be told, in order
	requests []uint16        // command ids of asynchronous event requests
	changed  []uint32        // namespaces, for log 04h
}

func newController(s *Subsystem, data *nvme.ConnectData) *controller {
	c := &controller{
		subsystem: s, hostNQN: data.HostNQN(), hostID: data.HostID(),
		queues: map[uint16]*queue{}, granted: int(s.maxQueues.Load()),
		enabled: nvme.AENNamespaceAttribute | nvme.AENANAChange,
	}
	if s.discovery {
		c.enabled = nvme.AENDiscoveryChange
	}
	c.cacheOff.Store(s.target.cfg.NoWriteCache)
	return c
}

// fail ends all connections of the controller.
func (c *controller) fail(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end(reason)
}

// end is fail with the lock held.
func (c *controller) end(reason string) {
	c.ended = true
	if c.timer != nil {
		c.timer.Stop()
	}
	// It stays ready: what arrives until the queues have ended gets no answer, or
	// a true one, but no error that a host would pass on.
	for _, q := range c.queues {
		q.kill(reason)
	}
}

// join adds a queue. It is refused if the controller ended, if it has a queue of
// that id, and, for I/O queues, if the controller is not enabled.
func (c *controller) join(q *queue) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.queues[q.qid] != nil || q.qid != 0 && !c.ready.Load() {
		return false
	}
	c.queues[q.qid] = q
	return true
}

// leave takes a queue away that executes no command any more. With the admin
// queue the controller ends, and with its last queue it is forgotten.
func (c *controller) leave(q *queue) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.queues, q.qid)
	if q.qid == 0 {
		c.end("admin queue ended")
	}
	c.finishStop()
	if c.ended && len(c.queues) == 0 {
		c.subsystem.target.controllers.remove(c)
	}
}

// stop is what a host asked a controller for that has to end all I/O first.
type stop uint8

const (
	stopNone stop = iota
	stopReset
	stopShutdown
	stopFlush // a shutdown whose I/O queues have left
)

// configure is a write of CC. A reset and a shutdown end the I/O queues; CSTS
// says that it is done when their commands have ended. A controller cannot be
// enabled before that.
func (c *controller) configure(cc nvme.CC) nvme.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.cc
	if cc.EN() && !old.EN() && c.stopping != stopNone {
		return nvme.StatusCommandSequence | dnr
	}
	c.cc = cc
	switch {
	case cc.EN() && !old.EN():
		c.enable()
	case !cc.EN() && old.EN():
		c.cc = 0
		if c.stopping == stopNone {
			c.stop(stopReset, "controller reset")
		}
	}
	switch {
	case cc.SHN() != nvme.ShutdownNone && old.SHN() == nvme.ShutdownNone:
		c.stop(stopShutdown, "controller shutdown")
	case cc.SHN() == nvme.ShutdownNone && old.SHN() != nvme.ShutdownNone && c.stopping == stopNone:
		c.csts = nvme.NewCSTS(c.csts.RDY(), c.csts.CFS(), nvme.ShutdownStatusNormal)
	}
	return nvme.StatusSuccess
}

// enable makes the controller ready, unless CC wants what there is not. The lock
// is held.
func (c *controller) enable() {
	cc := c.cc
	if cc.MPS() != 0 || cc.AMS() != 0 || cc.CSS() != nvme.CCSelectNVM && cc.CSS() != nvme.CCSelectAll ||
		!c.subsystem.discovery && (cc.IOSQES() != 6 || cc.IOCQES() != 4) {
		c.csts = nvme.NewCSTS(false, true, nvme.ShutdownStatusNormal)
		return
	}
	c.csts = nvme.NewCSTS(true, false, nvme.ShutdownStatusNormal)
	c.ready.Store(true)
	c.setKeepAlive(c.kato)
}

// stop ends readiness, keep alive and the I/O queues. The lock is held.
func (c *controller) stop(why stop, reason string) {
	c.ready.Store(false)
	if c.timer != nil {
		c.timer.Stop()
	}
	c.stopping = why
	if why == stopShutdown {
		c.csts = nvme.NewCSTS(c.csts.RDY(), c.csts.CFS(), nvme.ShutdownStatusRunning)
	}
	for qid, q := range c.queues {
		if qid != 0 {
			q.kill(reason)
		}
	}
	c.finishStop()
}

// finishStop finishes a reset or a shutdown once no I/O queue is left. The lock is
// held.
func (c *controller) finishStop() {
	io := len(c.queues)
	if c.queues[0] != nil {
		io--
	}
	if io > 0 {
		return
	}
	switch c.stopping {
	case stopReset:
		c.stopping = stopNone
		c.csts = nvme.NewCSTS(false, false, nvme.ShutdownStatusNormal)
	case stopShutdown:
		c.stopping = stopFlush
		c.subsystem.target.running.Go(c.flush)
	}
}

// flush makes what the subsystem holds durable, which ends a shutdown. An error
// shows as CSTS.CFS.
func (c *controller) flush() {
	err := c.subsystem.flush()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.subsystem.target.cfg.Log.Error("flush at shutdown failed", "controller", c.id, "err", err)
	}
	c.stopping = stopNone
	c.csts = nvme.NewCSTS(false, err != nil, nvme.ShutdownStatusNormal)
	if c.cc.SHN() != nvme.ShutdownNone {
		c.csts = nvme.NewCSTS(false, err != nil, nvme.ShutdownStatusComplete)
	}
}

// setKeepAlive sets the timeout and begins anew; the lock is held.
func (c *controller) setKeepAlive(d time.Duration) {
	c.kato = d
	if c.timer != nil {
		c.timer.Stop()
	}
	if d > 0 && !c.ended {
		c.alive.Store(false)
		c.timer = time.AfterFunc(d, c.expire)
	}
}

// restartKeepAlive lets the host be silent for its whole timeout from now on.
func (c *controller) restartKeepAlive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil && c.timer.Stop() {
		c.setKeepAlive(c.kato)
	}
}

// expire ends the controller unless a command came: traffic counts. A target that
// is stalled or frozen expires nothing.
func (c *controller) expire() {
	c.mu.Lock()
	if c.ended || c.kato == 0 {
		c.mu.Unlock()
		return
	}
	faults := &c.subsystem.target.faults
	if c.alive.Swap(false) || faults.stalled.Load() || faults.Frozen() {
		c.timer.Reset(c.kato)
		c.mu.Unlock()
		return
	}
	c.csts = nvme.NewCSTS(false, true, nvme.ShutdownStatusNormal)
	c.mu.Unlock()
	c.subsystem.target.log.Warn("keep alive expired", "controller", c.id, "host", c.hostNQN)
	c.fail("keep alive expired")
}

// notify tells the host of an event, unless it does not want to hear of it or
// has not read the log since the last time.
func (c *controller) notify(e event, nsid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e == eventNamespace && !slices.Contains(c.changed, nsid) {
		c.changed = append(c.changed, nsid) // no more than MaxNamespaces, which the log holds
	}
	if c.enabled&events[e].enable == 0 || c.masked[e] || slices.Contains(c.waiting, e) {
		return
	}
	c.masked[e] = true
	c.waiting = append(c.waiting, e)
	if admin := c.queues[0]; admin != nil {
		admin.wake()
	}
}

// request parks an asynchronous event request; false if there are too many.
func (c *controller) request(cid uint16) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.requests) == aerLimit {
		return false
	}
	c.requests = append(c.requests, cid)
	return true
}

// next is an event to tell the host, and the request to tell it by.
func (c *controller) next() (cid uint16, dw0 nvme.AsyncEvent, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) == 0 || len(c.requests) == 0 {
		return 0, 0, false
	}
	cid, dw0 = c.requests[0], events[c.waiting[0]].dw0
	c.requests, c.waiting = c.requests[1:], c.waiting[1:]
	return cid, dw0, true
}

// unmask lets an event be told again: its log was read.
func (c *controller) unmask(log uint8) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for e := range events {
		if events[e].log == log && log != 0 {
			c.masked[e] = false
		}
	}
}

// takeChanged is log page 04h; unless it is kept it begins anew.
func (c *controller) takeChanged(keep bool) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	page := make([]byte, nvme.IdentifySize)
	nvme.ChangedNSListAt(page).Set(c.changed)
	if !keep {
		c.changed = nil
	}
	return page
}
