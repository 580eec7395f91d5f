package rdmatest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/rdma"
)

// Fabric connects the endpoints of one process. One lock guards everything in it, because
// it is meant to be correct, not fast.
type Fabric struct {
	mu        sync.Mutex // guards all state of all objects of the fabric
	endpoints map[netip.Addr]*endpoint
	mrs       map[uint32]*memoryRegion // by local and by remote key
	nextKey   uint32
	nextQP    uint32
	delay     time.Duration
	changed   chan struct{} // closed and replaced when a fault changes
	objects   Objects
}

// endpoint is the part that all providers with one address share.
type endpoint struct {
	fabric    *Fabric
	addr      netip.Addr
	device    *device
	listeners map[uint16]*listener
	nextPort  uint16
	ids       map[*connID]struct{}
	cqs       map[*completionQueue]struct{}

	silent bool
	deaf   bool
	hold   bool
	refuse *refusal
}

// refusal holds the parameters of SetRefuse.
type refusal struct {
	reason  int
	private []byte
}

// Objects is the number of open objects of a fabric.
type Objects struct{ Listeners, IDs, QPs, CQs, PDs, MRs int }

// NewFabric makes a fabric without endpoints.
func NewFabric() *Fabric {
	return &Fabric{
		endpoints: make(map[netip.Addr]*endpoint),
		mrs:       make(map[uint32]*memoryRegion),
		nextKey:   rand.Uint32() &^ 1,
		nextQP:    16 + rand.Uint32N(1<<20),
		changed:   make(chan struct{}),
	}
}

// Provider returns the provider of the endpoint with this address. The first call for an
// address makes the endpoint. Resolve of an address without an endpoint gets no answer.
func (f *Fabric) Provider(addr netip.Addr) *Provider {
	f.mu.Lock()
	defer f.mu.Unlock()
	addr = addr.Unmap()
	e := f.endpoints[addr]
	if e == nil {
		e = &endpoint{
			fabric: f, addr: addr, nextPort: 49152,
			listeners: make(map[uint16]*listener),
			ids:       make(map[*connID]struct{}),
			cqs:       make(map[*completionQueue]struct{}),
		}
		e.device = newDevice(e)
		f.endpoints[addr] = e
		f.wake()
	}
	return &Provider{endpoint: e}
}

// Objects returns the number of open objects. It must be zero when all users have
// finished.
func (f *Fabric) Objects() Objects {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects
}

// wake wakes all goroutines that wait for the end of a fault.
func (f *Fabric) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// at calls fn with the endpoint of addr, which must exist, and then calls progress.
func (f *Fabric) at(addr netip.Addr, fn func(*endpoint)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.endpoints[addr.Unmap()]
	if e == nil {
		panic(fmt.Sprintf("rdmatest: no endpoint %s", addr))
	}
	fn(e)
	f.progress()
}

// progress makes every queue pair do its pending work.
func (f *Fabric) progress() {
	for _, e := range f.endpoints {
		for id := range e.ids {
			if id.qp != nil {
				id.qp.progress()
			}
		}
	}
	f.wake()
}

// SetDelay delays the effect of each work request by d after it was posted. With 0, it
// takes effect at once.
func (f *Fabric) SetDelay(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay = d
}

// SetSilent makes an endpoint neither send nor receive. Work requests from and to it stay
// outstanding, and connect requests get no answer. When silent is false again, everything
// continues.
func (f *Fabric) SetSilent(addr netip.Addr, silent bool) {
	f.at(addr, func(e *endpoint) { e.silent = silent })
}

// SetDeaf keeps acknowledgements from an endpoint: its work requests take effect, but they do
// not complete. When deaf is false again, they are repeated first, which the peer ignores. So
// their memory must still be registered then.
func (f *Fabric) SetDeaf(addr netip.Addr, deaf bool) {
	f.at(addr, func(e *endpoint) {
		for id := range e.ids {
			if e.deaf && !deaf && id.qp != nil {
				id.qp.repeat()
			}
		}
		e.deaf = deaf
	})
}

// SetRefuse makes an endpoint reject connect requests with this reason, and with private
// data if the reason is rdma.RejectConsumer. Reason 0 ends the refusal.
func (f *Fabric) SetRefuse(addr netip.Addr, reason int, private []byte) {
	f.at(addr, func(e *endpoint) {
		e.refuse = nil
		if reason != 0 {
			e.refuse = &refusal{reason: reason, private: slices.Clone(private)}
		}
	})
}

// SetHold keeps completions out of the completion queues of an endpoint. They arrive when
// hold is false again.
func (f *Fabric) SetHold(addr netip.Addr, hold bool) {
	f.at(addr, func(e *endpoint) {
		e.hold = hold
		if !hold {
			for q := range e.cqs {
				q.arrive()
			}
		}
	})
}

// Kill breaks a connection visibly for both sides: their queue pairs fail, and both get
// EventDisconnected.
func (f *Fabric) Kill(id rdma.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := id.(*connID)
	for _, side := range []*connID{c, c.peer} {
		if side == nil {
			continue
		}
		side.cut = true
		if side.qp != nil && !side.qp.destroyed {
			side.qp.progress()
			side.qp.fail()
		}
		side.reportDisconnected("killed")
	}
}

// KillAll kills every connection of an endpoint.
func (f *Fabric) KillAll(addr netip.Addr) {
	f.mu.Lock()
	var all []*connID
	if e := f.endpoints[addr.Unmap()]; e != nil {
		for id := range e.ids {
			all = append(all, id)
		}
	}
	f.mu.Unlock()
	for _, id := range all {
		f.Kill(id)
	}
}

// ReplaceDevice removes the device of an endpoint, with every connection on it, and gives
// the endpoint another one.
func (f *Fabric) ReplaceDevice(addr netip.Addr) {
	f.at(addr, func(e *endpoint) {
		for id := range e.ids {
			id.report(rdma.EventDeviceRemoved, "device replaced")
			if id.connected {
				id.disconnect()
			}
		}
		close(e.device.removed)
		e.device = newDevice(e)
	})
}

// Cut breaks a connection without an event. Outstanding and later sends complete with
// WCRetryExc, as after a cable was pulled.
func (f *Fabric) Cut(id rdma.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := id.(*connID)
	for _, side := range []*connID{c, c.peer} {
		if side == nil {
			continue
		}
		side.cut = true
		if side.qp != nil {
			side.qp.progress()
		}
	}
}
