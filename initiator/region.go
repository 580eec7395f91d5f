package initiator

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// regions are the regions of a namespace.
type regions struct {
	mu sync.Mutex // held to change the table
	// table has the regions by number. It is replaced as a whole.
	table atomic.Pointer[[block.MaxRegions + 1]*slab]
}

// find returns a region, or nil.
func (g *regions) find(number uint16) *slab {
	table := g.table.Load()
	if table == nil || int(number) >= len(table) {
		return nil
	}
	return table[number]
}

// set changes an entry of the table. The caller holds the lock.
func (g *regions) set(number uint16, b *slab) {
	next := new([block.MaxRegions + 1]*slab)
	if table := g.table.Load(); table != nil {
		*next = *table
	}
	next[number] = b
	g.table.Store(next)
}

// add gives a slab a number.
func (g *regions) add(b *slab) (number uint16, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for number = 1; number <= block.MaxRegions; number++ {
		if g.find(number) == nil {
			g.set(number, b)
			return number, nil
		}
	}
	return 0, fmt.Errorf("there are %d", block.MaxRegions)
}

func (g *regions) remove(number uint16) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(number, nil)
}

// region implements block.Region.
type region struct {
	ns     *Namespace
	memory *slab
	number uint16
	mu     sync.Mutex // held by Close
	closed bool
}

// Register implements block.Registrar. The memory is registered with the device of each path, and
// with those of later ones. Until Close, the target of each path can read and write all of it.
func (ns *Namespace) Register(mem []byte) (block.Region, error) {
	if len(mem) == 0 || hostmem.Addr(mem)%uint64(os.Getpagesize()) != 0 {
		return nil, fmt.Errorf("register region: %d bytes at %#x: not at a page", len(mem), hostmem.Addr(mem))
	}
	b := &slab{mem: mem, base: hostmem.Addr(mem), users: make([]users, len(ns.sub.lanes)), ready: true}
	if err := ns.sub.mem.adopt(b); err != nil {
		return nil, fmt.Errorf("register region: %w", err)
	}
	number, err := ns.regions.add(b)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("register region: %w", err), ns.sub.mem.disown(b))
	}
	return &region{ns: ns, memory: b, number: number}, nil
}

// Number implements block.Region.
func (r *region) Number() uint16 { return r.number }

// Close implements block.Region. A command in flight ends with its answer, with the loss of its
// association, which destroys the queue pairs, or after Config.IOTimeout, which is such a loss.
// Requests that are sent again after the loss find that the region is gone.
func (r *region) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("close region: it is closed")
	}
	r.memory.gone.Store(true)
	s := r.ns.sub
	s.redispatch()
	if err := s.awaitUsers(r.memory); err != nil {
		return fmt.Errorf("close region: %w", err)
	}
	s.settle()
	if err := s.mem.disown(r.memory); err != nil {
		return fmt.Errorf("close region: %w", err)
	}
	r.closed = true
	r.ns.regions.remove(r.number)
	return nil
}

// awaitUsers waits until the front ends have reaped all requests with data in a slab that is gone.
func (s *Subsystem) awaitUsers(b *slab) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, l := range s.lanes {
		for users := 1; ; <-tick.C {
			if err := l.loop.Call(func() { users = b.users[l.index].n }); err != nil {
				return err // its requests may still be in flight
			}
			if users == 0 {
				break
			}
		}
	}
	return nil
}

// locate finds the data of a request that names a region, and returns the number of bytes from
// there on, or an errno.
func (q *nsQueue) locate(r *request) (room int, errno unix.Errno) {
	if r.io.Segments > 0 {
		return q.locateSegments(r)
	}
	b := q.ns.regions.find(r.io.Region)
	switch {
	case b == nil || b.gone.Load():
		return 0, unix.EFAULT
	case r.io.Offset&3 != 0 || r.io.Offset > uint64(len(b.mem)):
		return 0, unix.EINVAL
	}
	r.data, r.at, r.inRegion = b, r.io.Offset, true
	b.users[q.lane.index].n++
	return len(b.mem) - int(r.io.Offset), 0
}
