package instant

import (
	"errors"
	"fmt"
	"sync"

	"ublk-nvmeof/block"
)

// Regions are the regions of a device. It implements the method of block.Registrar. The zero
// value has none.
type Regions struct {
	mu  sync.RWMutex // held for reading while a request uses a region
	mem [][]byte     // by number less 1; nil: free
}

// Register implements block.Registrar.
func (g *Regions) Register(mem []byte) (block.Region, error) {
	if len(mem) == 0 {
		return nil, errors.New("register region: it is empty")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.mem {
		if g.mem[i] == nil {
			g.mem[i] = mem
			return &region{g, uint16(i + 1)}, nil
		}
	}
	if len(g.mem) == block.MaxRegions {
		return nil, fmt.Errorf("register region: there are %d", block.MaxRegions)
	}
	g.mem = append(g.mem, mem)
	return &region{g, uint16(len(g.mem))}, nil
}

// from returns a region from an offset on; nil if there is no such region.
func (g *Regions) from(number uint16, offset uint64) []byte {
	if number == 0 || int(number) > len(g.mem) || g.mem[number-1] == nil {
		return nil
	}
	mem := g.mem[number-1]
	return mem[min(offset, uint64(len(mem))):]
}

// region implements block.Region.
type region struct {
	regions *Regions
	number  uint16
}

// Number implements block.Region.
func (r *region) Number() uint16 { return r.number }

// Close implements block.Region. Requests have ended when their Submit has.
func (r *region) Close() error {
	r.regions.mu.Lock()
	defer r.regions.mu.Unlock()
	if r.regions.mem[r.number-1] == nil {
		return errors.New("close region: it is closed")
	}
	r.regions.mem[r.number-1] = nil
	return nil
}
