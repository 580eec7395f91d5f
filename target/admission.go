package target

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Limits on connections whose host has not sent a Connect. Beyond them the oldest of
// the host that has most gives way: a host that means it sends its Connect at once.
const (
	maxUnconnected        = 128
	maxUnconnectedPerHost = 64
)

// admission bounds what hosts can have of a target: connections, and the memory
// of those that are connected. The target's lock guards it.
type admission struct {
	opening     int                // connections that are being made
	hosts       map[netip.Addr]int // connections by address, those that are being made too
	unconnected []*queuePair       // without a successful Connect, by age
	ending      int                // queues that gave way and have not ended
	endingOf    map[netip.Addr]int // the same by address
	memory      int64              // bytes of connected queues
}

// errMemory is the error of a Connect that finds the budget taken.
var errMemory = errors.New("no memory for queues is left")

// defaultQueueMemory is a quarter of the machine's memory, and at least 256 MiB.
func defaultQueueMemory() int64 {
	const least = 256 << 20
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return least
	}
	return max(least, int64(info.Totalram)*int64(info.Unit)/4)
}

// admit counts a connection of a host, or says why there can be none.
func (t *Target) admit(host netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.admission
	switch {
	case len(t.queues)+a.opening >= t.cfg.MaxConnections:
		return fmt.Errorf("%d connections: %w", t.cfg.MaxConnections, nvme.RDMARejectNoResources)
	case a.hosts[host] >= t.cfg.MaxPerHost:
		return fmt.Errorf("%d connections of one host: %w", t.cfg.MaxPerHost, nvme.RDMARejectNoResources)
	case a.ending >= maxUnconnected, a.ending >= maxUnconnected/2 && a.endingOf[host] > 0:
		return fmt.Errorf("%d connections are ending: %w", a.ending, nvme.RDMARejectNoResources)
	}
	a.opening++
	a.hosts[host]++
	return nil
}

// admitted takes notice of a queue that was made after admit. Too many that are
// not connected make the oldest end, of this host or of all; it is returned.
func (t *Target) admitted(q *queuePair) (ends *queuePair) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.admission
	a.opening--
	t.queues[q] = struct{}{}
	t.connects++
	ends = a.excess(q.host)
	if ends != nil {
		t.giveWay(ends)
	}
	a.unconnected = append(a.unconnected, q)
	if t.ctx.Err() != nil {
		q.kill("target closes") // Close did not see this queue
	}
	return ends
}

// excess returns the queue that must give way to one more of a host that is not
// connected, or nil: the oldest of this host if it has too many, or else of the host
// that has most.
func (a *admission) excess(host netip.Addr) *queuePair {
	count := map[netip.Addr]int{}
	for _, q := range a.unconnected {
		count[q.host]++
	}
	busiest := host
	if count[host] < maxUnconnectedPerHost {
		if len(a.unconnected) < maxUnconnected {
			return nil
		}
		for _, q := range a.unconnected {
			if count[q.host] > count[busiest] {
				busiest = q.host
			}
		}
	}
	i := slices.IndexFunc(a.unconnected, func(q *queuePair) bool { return q.host == busiest })
	return a.unconnected[i]
}

// whyGaveWay is the reason for the end of a connection by giveWay.
const whyGaveWay = "too many others wait for a Connect command"

// giveWay ends a queue that is not connected. The lock is held.
func (t *Target) giveWay(q *queuePair) {
	a := &t.admission
	a.forget(q)
	a.ending++
	a.endingOf[q.host]++
	q.gaveWay = true
	t.refusals["connection: "+whyGaveWay]++
	q.kill(whyGaveWay)
}

// forget takes a queue from those that are not connected.
func (a *admission) forget(q *queuePair) {
	for i, other := range a.unconnected {
		if other == q {
			a.unconnected = append(a.unconnected[:i], a.unconnected[i+1:]...)
			return
		}
	}
}

// connected takes notice of a successful Connect.
func (t *Target) connected(q *queuePair) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.admission.forget(q)
}

// ended gives back what a host had: of a queue, or, if that is nil, of a
// connection that was admitted and not made.
func (t *Target) ended(host netip.Addr, q *queuePair) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.admission
	if a.hosts[host]--; a.hosts[host] == 0 {
		delete(a.hosts, host)
	}
	if q == nil {
		a.opening--
		return
	}
	a.forget(q)
	if q.gaveWay {
		a.ending--
		if a.endingOf[host]--; a.endingOf[host] == 0 {
			delete(a.endingOf, host)
		}
	}
	a.memory -= q.memory
	delete(t.queues, q)
	t.past.add(q)
}

// takeMemory takes memory for a queue that gets connected.
func (t *Target) takeMemory(n int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n > t.cfg.QueueMemory-t.admission.memory {
		return errMemory
	}
	t.admission.memory += n
	return nil
}

// open makes the queue of a connect request. An error that wraps no
// nvme.RDMARejectStatus is want of resources.
func (t *Target) open(id rdma.ID) (*queuePair, error) {
	if reason := nvme.RDMARejectStatus(t.faults.reject.Load()); reason != 0 {
		return nil, fmt.Errorf("fault: %w", reason)
	}
	req, err := nvme.ParseRDMARequest(id.PrivateData())
	if err != nil {
		return nil, err
	}
	limit := t.cfg.QueueSize
	if req.QID == 0 {
		limit = adminDepth
	}
	if int(req.HSQSize) >= limit {
		return nil, fmt.Errorf("queue %d of %d entries, at most %d: %w", req.QID, int(req.HSQSize)+1, limit, nvme.RDMARejectInvalidHSQSize)
	}
	host := id.RemoteAddr().Addr()
	if err := t.admit(host); err != nil {
		return nil, err
	}
	q, err := newQueuePair(t, id, req)
	if err != nil {
		t.ended(host, nil)
		return nil, err
	}
	if ends := t.admitted(q); ends != nil {
		t.log.Warn("connection ends", "host", ends.host, "reason", whyGaveWay)
	}
	return q, nil
}
