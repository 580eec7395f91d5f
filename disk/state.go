package disk

import (
	"context"
	"iter"
	"sync"

	"ublk-nvmeof/block"
	"ublk-nvmeof/initiator"
)

// State is what a disk is like at one moment.
type State struct {
	// Connection is StateLive if requests can be sent. In StateConnecting they wait. In
	// StateDeleting and StateDead they fail. A Disk of New is live until it is closed.
	Connection initiator.State
	Paths      []initiator.PathInfo // none of a Disk of New
	Geometry   block.Geometry
	Present    bool  // the namespace is there, as far as is known
	Err        error // why the connection is dead
}

// State returns the present state.
func (d *Disk) State() State {
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	s := State{Connection: initiator.StateLive, Geometry: d.dev.Geometry(), Present: true}
	if d.sub != nil {
		info := d.sub.Info()
		s.Connection, s.Paths, s.Present, s.Err = info.State, info.Paths, d.ns.Present(), d.sub.Err()
	}
	if closed && s.Connection != initiator.StateDead {
		s.Connection = initiator.StateDeleting
	}
	return s
}

// States yields the present state, and then a new one after each change: a path is lost or made
// again, the namespace has another size or write protection, or is gone. Changes that occur
// while the loop's body runs are yielded as one. It ends when ctx is done, and after the
// state in which the disk is closed.
func (d *Disk) States(ctx context.Context) iter.Seq[State] {
	return func(yield func(State) bool) {
		for {
			changed := d.watch.next()
			s := d.State()
			if !yield(s) || s.Connection == initiator.StateDeleting {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}
}

// Subsystem returns the connection of a disk that Open has made, for paths that are added,
// statistics and administration, and nil for a Disk of New. Only the disk closes it.
func (d *Disk) Subsystem() *initiator.Subsystem { return d.sub }

// Namespace returns the namespace of a disk that Open has made, for example to reserve it, and
// nil for a Disk of New.
func (d *Disk) Namespace() *initiator.Namespace { return d.ns }

// watch tells any number of goroutines that something has changed.
type watch struct {
	mu      sync.Mutex
	changed chan struct{} // closed at the next change; nil: nobody waits
}

// notify does not block.
func (w *watch) notify() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}

// next returns a channel that is closed at the next change.
func (w *watch) next() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	return w.changed
}
