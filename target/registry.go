package target

import (
	"math/rand/v2"
	"sync"
)

// registry holds the controllers of all subsystems of a target. A controller stays in
// it until its last queue has left. While it is found, a command of its host may still
// execute. Ids are unique in the target, so that a subsystem that is removed and added
// again still finds its old controllers.
type registry struct {
	mu   sync.Mutex // guards what follows; no other lock is taken while it is held
	byID map[uint16]*controller
	last uint16 // the id assigned last

	least, most uint16 // ids to assign
}

// newRegistry returns an empty registry for ids from least to most. It begins at a random id,
// so that ids of an earlier process are not soon those of other controllers.
func newRegistry(least, most uint16) registry {
	return registry{byID: map[uint16]*controller{}, last: least + uint16(rand.IntN(int(most-least)+1)), least: least, most: most}
}

// add assigns the next free id to a new controller. It returns false if no id is free.
func (r *registry) add(c *controller) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for range int(r.most-r.least) + 1 {
		if r.last++; r.last > r.most || r.last < r.least {
			r.last = r.least
		}
		if r.byID[r.last] == nil {
			c.id = r.last
			r.byID[c.id] = c
			return true
		}
	}
	return false
}

func (r *registry) remove(c *controller) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, c.id)
}

// find returns the controller with this id in the subsystem with this NQN, or nil.
func (r *registry) find(id uint16, nqn string) *controller {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.byID[id]
	if c == nil || c.subsystem.cfg.NQN != nqn {
		return nil
	}
	return c
}

// of returns the controllers of a subsystem, or all controllers if s is nil.
func (r *registry) of(s *Subsystem) []*controller {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*controller
	for _, c := range r.byID {
		if s == nil || c.subsystem == s {
			all = append(all, c)
		}
	}
	return all
}
