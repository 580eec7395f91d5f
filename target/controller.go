package target

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
)

const (
	aerLimit         = 4                 // outstanding asynchronous event requests
	keepAliveUnit    = 10                // KAS, in 100 ms
	discoveryTimeout = 120 * time.Second // keep alive timeout if the host of a discovery controller asks for none
	readyTimeout     = 15                // CAP.TO and CRTO, in 500 ms
)

// event is a kind of asynchronous event.
type event uint8

const (
	eventUnset event = iota
	eventNamespace
	eventANA
	eventDiscovery
	numEvents
)

// events holds the AEN bit, the completion and the log page of each event.
var events = [numEvents]struct {
	enable uint32
	dw0    nvme.AsyncEvent
	log    uint8
}{
	eventNamespace: {nvme.AENNamespaceAttribute, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeNamespaceChanged, nvme.LogChangedNamespaces), nvme.LogChangedNamespaces},
	eventANA:       {nvme.AENANAChange, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeANAChanged, nvme.LogANA), nvme.LogANA},
	eventDiscovery: {nvme.AENDiscoveryChange, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeDiscoveryChanged, nvme.LogDiscovery), nvme.LogDiscovery},
}

// controller is created by the Connect command of an admin queue, and ends with that
// queue. Its id stays known until all its queues have left. A queue leaves when none of
// its commands executes any more.
type controller struct {
	subsystem *Subsystem
	port      *Port
	id        uint16
	subNQN    string // by which the host calls the subsystem
	hostNQN   string
	hostID    nvme.UUID

	ready    atomic.Bool // CSTS.RDY, read by every command
	alive    atomic.Bool // a command has arrived since the keep alive timer was started
	cacheOff atomic.Bool // the host turned the volatile write cache off
	errors   errorLog

	mu       sync.Mutex // guards what follows
	queues   map[uint16]*queuePair
	ended    bool // no queue may join
	stopping stop // the request that completes when the I/O queues have left
	cc       nvme.CC
	csts     nvme.CSTS
	granted  int // I/O queues
	kato     time.Duration
	timer    *time.Timer     // keep alive timer
	enabled  uint32          // AEN bits
	masked   [numEvents]bool // the host was notified and has not read the log page since
	waiting  []event         // events that the host has yet to be notified of, in order
	requests []uint16        // command ids of asynchronous event requests
	changed  []uint32        // ids of changed namespaces, for log page 04h
}

func newController(s *Subsystem, p *Port, data *nvme.ConnectData) *controller {
	c := &controller{
		subsystem: s, port: p, subNQN: data.SubNQN(), hostNQN: data.HostNQN(), hostID: data.HostID(),
		queues: map[uint16]*queuePair{}, granted: int(s.maxQueues.Load()),
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

// end does what fail does. The caller holds the lock.
func (c *controller) end(reason string) {
	c.ended = true
	if c.timer != nil {
		c.timer.Stop()
	}
	// The controller stays ready: a command that arrives before its queue has ended
	// must not be completed with an error that the host would report.
	for _, q := range c.queues {
		q.kill(reason)
	}
}

// join adds a queue. It returns false if the controller has ended or has a queue with
// this id, and, for I/O queues, if the controller is not enabled.
func (c *controller) join(q *queuePair) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.queues[q.qid] != nil || q.qid != 0 && !c.ready.Load() {
		return false
	}
	c.queues[q.qid] = q
	return true
}

// leave removes a queue that executes no command any more. The controller ends with
// its admin queue, and is forgotten with its last queue.
func (c *controller) leave(q *queuePair) {
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

// stop is a request of the host that is complete when no I/O command executes.
type stop uint8

const (
	stopNone stop = iota
	stopReset
	stopShutdown
	stopFlush // a shutdown whose I/O queues have left
)

// configure carries out a write of CC. A reset and a shutdown end the I/O queues, and
// CSTS says that they are complete when the commands of those queues have ended.
// Until then the controller cannot be enabled.
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

// enable makes the controller ready, or sets CSTS.CFS if CC asks for something that
// is not supported. The caller holds the lock.
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

// stop disables the controller and ends its I/O queues. The caller holds the lock.
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

// finishStop completes a reset or a shutdown if no I/O queue is left. The caller
// holds the lock.
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

// flush flushes all namespaces, and then completes a shutdown. An error sets CSTS.CFS.
func (c *controller) flush() {
	err := c.subsystem.flush()
	if err != nil {
		c.subsystem.target.cfg.Log.Error("flush at shutdown failed", "controller", c.id, "err", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopping = stopNone
	c.csts = nvme.NewCSTS(false, err != nil, nvme.ShutdownStatusNormal)
	if c.cc.SHN() != nvme.ShutdownNone {
		c.csts = nvme.NewCSTS(false, err != nil, nvme.ShutdownStatusComplete)
	}
}

// setKeepAlive sets the keep alive timeout and restarts the timer; 0 stops it. The
// caller holds the lock.
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

// restartKeepAlive restarts the keep alive timer if it runs.
func (c *controller) restartKeepAlive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil && c.timer.Stop() {
		c.setKeepAlive(c.kato)
	}
}

// expire ends the controller if no command has kept it alive since the timer was
// started. It restarts the timer while the target is stalled or frozen.
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

// notify notifies the host of an event, unless the host disabled it or has not read the
// log page since the last one.
func (c *controller) notify(e event, nsid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e == eventNamespace && !slices.Contains(c.changed, nsid) {
		c.changed = append(c.changed, nsid) // at most MaxNamespaces, which the log page can hold
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

// request keeps an Asynchronous Event Request until there is an event. It returns
// false if there are too many.
func (c *controller) request(cid uint16) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.requests) == aerLimit {
		return false
	}
	c.requests = append(c.requests, cid)
	return true
}

// next removes the first event that waits and the first request, which is to be
// completed with it. It returns false if there is no event or no request.
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

// unmask allows new notifications of the events whose log page is log, because the host
// has read it.
func (c *controller) unmask(log uint8) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for e := range events {
		if events[e].log == log && log != 0 {
			c.masked[e] = false
		}
	}
}

// takeChanged returns log page 04h, and clears it unless keep is set.
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
