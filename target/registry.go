package target

import (
	"math/rand/v2"
	"sync"

	"ublk-nvmeof/nvme"
)

// registry holds the controllers of a target, of all its subsystems. A
// controller stays in it until its last queue has left: as long as it is found,
// a command of its host may still be executing. Ids are unique in the target, so
// that a subsystem that is removed and added again still finds the controllers
// that it had.
type registry struct {
	mu   sync.Mutex // guards what follows; nothing else is locked under it
	byID map[uint16]*controller
	last uint16 // id that was given out last
}

// newRegistry begins at a random id: the ids that an earlier process gave out
// are not soon those of other controllers.
func newRegistry() registry {
	return registry{byID: map[uint16]*controller{}, last: uint16(rand.IntN(nvme.CNTLIDMax))}
}

// add gives a new controller its id, the next one that is free; false when none
// is left.
func (r *registry) add(c *controller) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for range nvme.CNTLIDMax {
		r.last = r.last%nvme.CNTLIDMax + 1
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

// find finds the controller with this id of the subsystem with this name, nil if
// there is none.
func (r *registry) find(id uint16, nqn string) *controller {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.byID[id]
	if c == nil || c.subsystem.cfg.NQN != nqn {
		return nil
	}
	return c
}

// of lists the controllers of a subsystem, or all if it is nil.
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
