package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
)

const blockSize = 4096

// disk is what is known of the blocks of a namespace. Each write gives each of its
// blocks a new version, which the block's content names. A block has at most one write
// in flight.
type disk struct {
	id       uint32 // part of each block's content
	blocks   int
	volatile bool // the target has a cache that its death empties

	mu    sync.Mutex
	epoch int // lives of the target; only of a volatile disk
	state []blockState
}

// blockState holds versions of one block; 0 was never written.
type blockState struct {
	issued  uint64 // last that was given to the server
	acked   uint64 // last that the server confirmed, of this epoch
	seen    uint64 // newest that was read, of this epoch
	flushed uint64 // last before a flush that the server confirmed
	zeroes  uint64 // last that was zeroes
	writing bool   // a write is in flight
}

func newDisk(id uint32, blocks int, volatile bool) *disk {
	return &disk{id: id, blocks: blocks, volatile: volatile, state: make([]blockState, blocks)}
}

// oldest is the oldest version that a read which begins now may return.
func (s *blockState) oldest() uint64 { return max(s.acked, s.seen) }

// fill writes the content of a version of a block.
func (d *disk) fill(b []byte, block int, version uint64) {
	word := version*0x9e3779b97f4a7c15 + uint64(d.id)<<32 + uint64(block)
	binary.LittleEndian.PutUint64(b, version)
	for i := 8; i < blockSize; i += 8 {
		word = word*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], word)
	}
}

// version is the inverse of fill. Zeroes have version 0.
func (d *disk) version(b, scratch []byte, block int) (uint64, error) {
	version := binary.LittleEndian.Uint64(b)
	clear(scratch)
	if version != 0 {
		d.fill(scratch, block, version)
	}
	if string(b) != string(scratch) {
		return 0, fmt.Errorf("namespace %d, block %d: content is neither that of version %d nor zeroes", d.id, block, version)
	}
	return version, nil
}

// allows says whether a block may have the version that was read, if no version before
// oldest is allowed. The caller holds d.mu.
func (d *disk) allows(block int, version, oldest uint64) error {
	s := &d.state[block]
	switch {
	case version == 0 && (oldest == 0 || s.zeroes >= oldest):
		return nil
	case version == 0:
		return fmt.Errorf("namespace %d, block %d: zeroes, want version %d to %d (flushed %d, zeroes %d)", d.id, block, oldest, s.issued, s.flushed, s.zeroes)
	case version < oldest || version > s.issued:
		return fmt.Errorf("namespace %d, block %d: version %d, want %d to %d (flushed %d)", d.id, block, version, oldest, s.issued, s.flushed)
	}
	return nil
}

// beginRead returns the oldest versions that the read may return.
func (d *disk) beginRead(first, n int) (oldest []uint64, epoch int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	oldest = make([]uint64, n)
	for i := range oldest {
		oldest[i] = d.state[first+i].oldest()
	}
	return oldest, d.epoch
}

// endRead checks what was read.
func (d *disk) endRead(data []byte, first int, oldest []uint64, epoch int) error {
	scratch := make([]byte, blockSize)
	versions := make([]uint64, len(oldest))
	for i := range versions {
		var err error
		if versions[i], err = d.version(data[i*blockSize:][:blockSize], scratch, first+i); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, version := range versions {
		s := &d.state[first+i]
		if epoch != d.epoch { // the target died meanwhile
			oldest[i] = min(oldest[i], s.flushed)
		}
		if err := d.allows(first+i, version, oldest[i]); err != nil {
			return err
		}
		if epoch == d.epoch {
			s.seen = max(s.seen, version)
		}
	}
	return nil
}

// beginWrite chooses up to n blocks without a write in flight, and gives them new
// versions.
func (d *disk) beginWrite(n int, zeroes bool) (first int, versions []uint64, epoch int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		first = rand.IntN(d.blocks)
		for i := first; i < min(first+n, d.blocks) && !d.state[i].writing; i++ {
			s := &d.state[i]
			s.writing = true
			s.issued++
			if zeroes {
				s.zeroes = s.issued
			}
			versions = append(versions, s.issued)
		}
		if len(versions) > 0 {
			return first, versions, d.epoch
		}
	}
}

// endWrite notes that a write was confirmed, or is durable already.
func (d *disk) endWrite(first int, versions []uint64, epoch int, durable bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, version := range versions {
		s := &d.state[first+i]
		s.writing = false
		if epoch != d.epoch {
			continue // it may have been in the cache of the target that died
		}
		s.acked = version
		if durable {
			s.flushed = version
		}
	}
}

// beginFlush returns the versions that the flush is to make durable.
func (d *disk) beginFlush() (acked []uint64, epoch int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	acked = make([]uint64, d.blocks)
	for i := range acked {
		acked[i] = d.state[i].acked
	}
	return acked, d.epoch
}

func (d *disk) endFlush(acked []uint64, epoch int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if epoch != d.epoch {
		return // it may have reached a target that never had the writes
	}
	for i, version := range acked {
		d.state[i].flushed = max(d.state[i].flushed, version)
	}
}

// targetDied is called between the death of a target and the start of the next.
func (d *disk) targetDied() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.volatile {
		return
	}
	d.epoch++
	for i := range d.state {
		s := &d.state[i]
		s.acked, s.seen = s.flushed, s.flushed
	}
}

// checkAll checks the whole content of the disk while nothing is in flight.
func (d *disk) checkAll(data []byte) error {
	scratch := make([]byte, blockSize)
	for block := range d.blocks {
		version, err := d.version(data[block*blockSize:][:blockSize], scratch, block)
		if err != nil {
			return err
		}
		d.mu.Lock()
		err = d.allows(block, version, d.state[block].oldest())
		d.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}
