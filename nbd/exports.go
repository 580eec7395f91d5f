package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/poller"
)

// geometry returns the present geometry of the device, with the block size of the time
// when the export was added.
func (e *export) geometry() block.Geometry {
	g := e.Device.Geometry()
	g.LogicalBlock = e.block
	g.Sectors = min(g.Sectors, maxSize>>block.SectorShift) &^ (uint64(e.block>>block.SectorShift) - 1)
	return g
}

// ErrExists means that an export with this name exists. Another one can be added after
// Remove has returned nil.
var ErrExists = errors.New("NBD export exists")

// export is an Export while it is served.
type export struct {
	Export
	block   uint32         // bytes of a logical block; does not change
	buffer  int            // bytes of a tag's buffer
	share   int            // number of tags that a connection may hold
	shards  []*shard       // by loop
	removed bool           // the export accepts no more clients; guarded by Server.mu
	ending  sync.WaitGroup // the connections in the transmission phase
}

// Add adds an export. Errors are those of New, ErrStopped and ErrExists.
func (s *Server) Add(x Export) error {
	if err := x.check(); err != nil {
		return fmt.Errorf("export %q: %w", x.Name, err)
	}
	g := x.Device.Geometry()
	e := &export{Export: x, block: g.LogicalBlock}
	e.buffer = frontend.BufferSize(s.cfg.MaxIO, g, 2) // merge needs two blocks
	e.share, _ = split(s.cfg.Depth)
	s.changing.Lock()
	defer s.changing.Unlock()
	switch {
	case s.isEnded():
		return ErrStopped
	case slices.ContainsFunc(s.exports, func(have *export) bool { return have.Name == x.Name }):
		return fmt.Errorf("export %q: %w", x.Name, ErrExists)
	}
	locks := &stripes{loops: s.pollers()}
	for i := range s.loops {
		back, err := x.Device.OpenQueue(i, block.QueueConfig{Depth: s.cfg.Depth, MaxIO: e.buffer})
		if err != nil {
			return errors.Join(fmt.Errorf("export %q: open queue %d: %w", x.Name, i, err), s.closeShards(e))
		}
		e.shards = append(e.shards, newShard(back, x.Device, e.buffer, s.cfg.Depth, locks))
	}
	for i, l := range s.loops {
		if err := l.Call(func() { l.worker.shards = append(l.worker.shards, e.shards[i]) }); err != nil {
			return errors.Join(fmt.Errorf("export %q: %w", x.Name, err), s.closeShards(e))
		}
	}
	s.mu.Lock()
	s.exports = append(s.exports, e)
	s.mu.Unlock()
	return nil
}

func (s *Server) pollers() []*poller.Loop {
	var all []*poller.Loop
	for _, l := range s.loops {
		all = append(all, l.Loop)
	}
	return all
}

// closeShards frees an export's memory. If a loop has ended with requests in flight, the
// back end may still use their memory. The memory is then kept, and the error says so.
func (s *Server) closeShards(e *export) error {
	var errs []error
	for i, sh := range e.shards {
		l := s.loops[i]
		remove := func() {
			w := l.worker
			w.shards = slices.DeleteFunc(w.shards, func(have *shard) bool { return have == sh })
			if n := sh.inflight + len(sh.reqs); n > 0 {
				errs = append(errs, fmt.Errorf("export %q: %w with %d requests in flight", e.Name, poller.ErrStopped, n))
				return
			}
			errs = append(errs, sh.back.Close())
		}
		if l.Call(remove) != nil { // the loop has ended
			remove()
		}
	}
	return errors.Join(errs...)
}

// Remove ends an export, in the same way as Stop ends all of them. If there is no export
// of that name, it returns nil.
func (s *Server) Remove(ctx context.Context, name string, force bool) error {
	s.mu.Lock()
	i := slices.IndexFunc(s.exports, func(e *export) bool { return e.Name == name })
	if i < 0 {
		s.mu.Unlock()
		return nil
	}
	e := s.exports[i]
	if n := s.users(e); n > 0 && !force {
		s.mu.Unlock()
		return fmt.Errorf("remove export %q: %w: %d connections", name, ErrBusy, n)
	}
	e.removed = true
	s.mu.Unlock()
	if err := s.await(ctx, &e.ending, e); err != nil {
		return fmt.Errorf("remove export %q: %w", name, err)
	}
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	i = slices.Index(s.exports, e)
	if i >= 0 {
		s.exports = slices.Delete(s.exports, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 || s.closed {
		return nil // another Remove or Stop was faster
	}
	return s.closeShards(e)
}

// users counts the connections of an export. The caller holds mu.
func (s *Server) users(e *export) int {
	n := 0
	for c := range s.conns {
		if c.offer.export == e {
			n++
		}
	}
	return n
}

// Users returns the number of connections to an export.
func (s *Server) Users(name string) int {
	e := s.find(name)
	if e == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.users(e)
}

// find returns the export with a name, or nil.
func (s *Server) find(name string) *export {
	for _, e := range s.list() {
		if e.Name == name || name == "" {
			return e
		}
	}
	return nil
}

// list returns all exports that clients can choose.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.exports), func(e *export) bool { return e.removed })
}

// Snapshot returns the counters of an export, summed over all loops. The counters of each
// loop are those of its last batch.
func (s *Server) Snapshot(name string) block.Stats {
	var total block.Stats
	if e := s.find(name); e != nil {
		for _, sh := range e.shards {
			total.Add(sh.Snapshot())
		}
	}
	return total
}
