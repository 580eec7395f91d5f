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

// Limits on connections without a Connect command. Beyond a limit, the oldest
// connection of the host that has most of them ends. An honest host sends its Connect
// command at once.
const (
	maxUnconnected        = 128
	maxUnconnectedPerHost = 64
)

// admission limits the connections of a target and the memory of its connected queues.
// The lock of the target guards it.
type admission struct {
	opening     int                // connections that are being established
	hosts       map[netip.Addr]int // connections by address, including those that are being established
	unconnected []*queuePair       // without a successful Connect command, oldest first
	ending      int                // queues that gave way and have not ended yet
	endingOf    map[netip.Addr]int // the same by address
	memory      int64              // bytes of connected queues
}

// errMemory means that the memory of Config.QueueMemory is used up.
var errMemory = errors.New("no memory for queues is left")

// defaultQueueMemory returns a quarter of the machine's memory in bytes, at least 256
// MiB.
func defaultQueueMemory() int64 {
	const least = 256 << 20
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return least
	}
	return max(least, int64(info.Totalram)*int64(info.Unit)/4)
}

// admit counts a new connection of a host, or returns why it is refused.
func (t *Target) admit(host netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.admission
	switch {
	case len(t.queues)+a.opening >= t.cfg.MaxConnections:
		return fmt.Errorf("the limit of %d connections is reached: %w", t.cfg.MaxConnections, nvme.RDMARejectNoResources)
	case a.hosts[host] >= t.cfg.MaxPerHost:
		return fmt.Errorf("the limit of %d connections of one host is reached: %w", t.cfg.MaxPerHost, nvme.RDMARejectNoResources)
	case a.ending >= maxUnconnected, a.ending >= maxUnconnected/2 && a.endingOf[host] > 0:
		return fmt.Errorf("%d connections are ending: %w", a.ending, nvme.RDMARejectNoResources)
	}
	a.opening++
	a.hosts[host]++
	return nil
}

// admitted records a queue that was made after admit. If too many queues are not
// connected, it ends the oldest one, of this host or of the host that has most, and
// returns it.
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
		q.kill("target closes") // Close has not ended this queue
	}
	return ends
}

// excess returns the queue that must end to make room for another one of a host that is
// not connected, or nil. It is the oldest queue of this host if the host has too many,
// and otherwise the oldest queue of the host that has most.
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

// giveWay ends a queue that is not connected. The caller holds the lock.
func (t *Target) giveWay(q *queuePair) {
	a := &t.admission
	a.forget(q)
	a.ending++
	a.endingOf[q.host]++
	q.gaveWay = true
	t.refusals["connection: "+whyGaveWay]++
	q.kill(whyGaveWay)
}

// forget removes a queue from unconnected.
func (a *admission) forget(q *queuePair) {
	for i, other := range a.unconnected {
		if other == q {
			a.unconnected = append(a.unconnected[:i], a.unconnected[i+1:]...)
			return
		}
	}
}

// connected records a successful Connect command.
func (t *Target) connected(q *queuePair) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.admission.forget(q)
}

// ended releases what was counted for a queue of a host. A nil queue stands for a
// connection that was admitted, but for which no queue could be made.
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

// takeMemory takes n bytes from Config.QueueMemory for a queue, or returns errMemory.
// If n is negative, it gives them back.
func (t *Target) takeMemory(n int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n > t.cfg.QueueMemory-t.admission.memory {
		return errMemory
	}
	t.admission.memory += n
	return nil
}

// open makes the queue for a connect request. An error that wraps no
// nvme.RDMARejectStatus means that resources are missing.
func (t *Target) open(id rdma.ID, p *Port) (*queuePair, error) {
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
		return nil, fmt.Errorf("queue %d has %d entries; want at most %d: %w", req.QID, int(req.HSQSize)+1, limit, nvme.RDMARejectInvalidHSQSize)
	}
	host := id.RemoteAddr().Addr()
	if err := t.admit(host); err != nil {
		return nil, err
	}
	q, err := newQueuePair(p, id, req)
	if err != nil {
		t.ended(host, nil)
		return nil, err
	}
	if ends := t.admitted(q); ends != nil {
		t.log.Warn("connection ends", "host", ends.host, "reason", whyGaveWay)
	}
	return q, nil
}
