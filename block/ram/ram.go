// Package ram is a block back end that keeps its data in the memory of this process.
// It is the reference for front ends: a read must return what was written. Requests
// are executed at once, on the loop that submits them.
//
// Concurrent requests of several queues to the same sectors mix their data, as on a
// disk.
package ram

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// Config configures New. Zero fields of the geometry get defaults: 64 MiB,
// blocks of 512 bytes, 1 MiB per request, discard and write zeroes of any
// size. A discarded range reads as zeroes.
type Config struct {
	Geometry block.Geometry
}

// Device is a block.Device in memory. Every loop may open a queue.
type Device struct {
	geometry block.Geometry
	mem      []byte
}

// maxRange is the largest discard or write zeroes, in sectors: 1 GiB.
const maxRange = 1 << 30 >> block.SectorShift

// New makes a Device of zeroes and allocates all its memory. The error is that of
// Geometry.Validate, or that there is not enough memory.
func New(cfg Config) (*Device, error) {
	g := cfg.Geometry
	if g.Sectors == 0 {
		g.Sectors = 64 << 20 >> block.SectorShift
	}
	if g.LogicalBlock == 0 {
		g.LogicalBlock = 512
	}
	if g.PhysicalBlock == 0 {
		g.PhysicalBlock = g.LogicalBlock
	}
	if g.MaxIO == 0 {
		g.MaxIO = 1 << 20
	}
	if g.MaxDiscardSectors == 0 {
		g.MaxDiscardSectors = maxRange
	}
	if g.MaxZeroesSectors == 0 {
		g.MaxZeroesSectors = maxRange
	}
	if err := g.Validate(); err != nil {
		return nil, err
	}
	mem, err := hostmem.Map(int(g.Sectors << block.SectorShift))
	if err != nil {
		return nil, fmt.Errorf("make ram device: %w", err)
	}
	return &Device{geometry: g, mem: mem}, nil
}

// Close frees the memory. No queue may be open.
func (d *Device) Close() error { return hostmem.Unmap(d.mem) }

// Geometry returns the geometry of Config with its defaults.
func (d *Device) Geometry() block.Geometry { return d.geometry }

// OpenQueue makes a queue. It fails only if there is not enough memory.
func (d *Device) OpenQueue(_ int, cfg block.QueueConfig) (block.Queue, error) {
	mem, err := hostmem.Map(cfg.Depth * cfg.MaxIO)
	if err != nil {
		return nil, err
	}
	return &queue{dev: d, mem: mem, size: cfg.MaxIO, done: make([]block.Result, 0, cfg.Depth)}, nil
}

// queue completes requests in the order of their submission.
type queue struct {
	dev  *Device
	mem  []byte
	size int
	done []block.Result // results; those from next on are not reaped
	next int
}

func (q *queue) Buffer(tag uint16) []byte {
	off := int(tag) * q.size
	return q.mem[off : off+q.size : off+q.size]
}

func (q *queue) Submit(reqs []block.Request) {
	for i := range reqs {
		r := &reqs[i]
		q.done = append(q.done, block.Result{Tag: r.Tag, Errno: uint16(q.serve(r))})
	}
}

// serve executes a request. Errors are those of block.Request.Check, and EROFS for changes
// of a read-only device.
func (q *queue) serve(r *block.Request) unix.Errno {
	d := q.dev
	switch e := r.Check(d.geometry.Sectors, d.geometry.LogicalBlock, q.size); {
	case e != 0:
		return e
	case r.Op == block.OpFlush:
		return 0
	case r.Op != block.OpRead && d.geometry.ReadOnly:
		return unix.EROFS
	}
	data := d.mem[r.Sector<<block.SectorShift:][:uint64(r.Sectors)<<block.SectorShift]
	switch r.Op {
	case block.OpRead:
		copy(q.Buffer(r.Tag), data)
	case block.OpWrite:
		copy(data, q.Buffer(r.Tag))
	default: // a discard or write zeroes
		clear(data)
	}
	return 0
}

func (q *queue) Reap(done []block.Result) int {
	n := copy(done, q.done[q.next:])
	q.next += n
	if q.next == len(q.done) {
		q.done, q.next = q.done[:0], 0
	}
	return n
}

func (q *queue) Close() error {
	if q.next < len(q.done) {
		return errors.New("close ram queue: requests are in flight")
	}
	return hostmem.Unmap(q.mem)
}
