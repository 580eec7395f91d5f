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

// Fabric joins the endpoints of one process. One lock guards everything in it:
// it is meant to be right, not fast.
type Fabric struct {
	mu        sync.Mutex // guards all state of all objects of the fabric
	endpoints map[netip.Addr]*endpoint
	mrs       map[uint32]*memoryRegion // by local and by remote key
	nextKey   uint32
	nextQP    uint32
	delay     time.Duration
	changed   chan struct{} // closed and made anew when a fault changes
	objects   Objects
}

// endpoint is what the providers with one address share.
type endpoint struct {
	fabric    *Fabric
	addr      netip.Addr
	device    *device
	listeners map[uint16]*listener
	nextPort  uint16
	ids       map[*connID]struct{}
	cqs       map[*completionQueue]struct{}

	silent bool
	hold   bool
	refuse *refusal
}

// refusal is what SetRefuse asked for.
type refusal struct {
	reason  int
	private []byte
}

// Objects counts what is open on a fabric.
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

// Provider gives the provider of the endpoint with this address, which comes
// into being when first named. Resolve of an address without endpoint gets no
// answer.
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
		e.device = &device{endpoint: e}
		f.endpoints[addr] = e
		f.wake()
	}
	return &Provider{endpoint: e}
}

// Objects counts what is open now. When all users are done, it must be zero.
func (f *Fabric) Objects() Objects {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects
}

// wake makes all goroutines that wait for the end of a fault look again.
func (f *Fabric) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// at calls fn with the endpoint of addr, which must exist, and lets all queue
// pairs go on.
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

// progress lets every queue pair do what it can.
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

// SetDelay lets a work request take effect only d after it was posted; 0 makes
// it take effect at once again.
func (f *Fabric) SetDelay(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay = d
}

// SetSilent makes an endpoint neither send nor receive: work requests from and
// to it stay outstanding, connect requests unanswered. When it ends, all goes
// on where it stood.
func (f *Fabric) SetSilent(addr netip.Addr, silent bool) {
	f.at(addr, func(e *endpoint) { e.silent = silent })
}

// SetRefuse makes an endpoint reject connect requests with this reason, and
// with private data if that is rdma.RejectConsumer; reason 0 ends it.
func (f *Fabric) SetRefuse(addr netip.Addr, reason int, private []byte) {
	f.at(addr, func(e *endpoint) {
		e.refuse = nil
		if reason != 0 {
			e.refuse = &refusal{reason: reason, private: slices.Clone(private)}
		}
	})
}

// SetHold keeps completions away from the completion queues of an endpoint;
// when it ends they arrive.
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

// Kill breaks a connection for both sides to see: their queue pairs fail, and
// both get EventDisconnected.
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

// ReplaceDevice takes the device of an endpoint away, with every connection on
// it, and gives it another one.
func (f *Fabric) ReplaceDevice(addr netip.Addr) {
	f.at(addr, func(e *endpoint) {
		for id := range e.ids {
			id.report(rdma.EventDeviceRemoved, "device replaced")
			if id.connected {
				id.disconnect()
			}
		}
		e.device = &device{endpoint: e}
	})
}

// Cut breaks a connection without an event: outstanding and later sends
// complete with WCRetryExc, as after a cable was pulled.
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
