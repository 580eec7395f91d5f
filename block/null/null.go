// Package null is a block back end that does nothing. Every request that block.Request.Check
// accepts succeeds at once, and a read returns the old contents of the buffer. The package
// serves to measure a front end without a back end.
package null

import (
	"errors"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// Config configures New. Zero fields of the geometry get defaults: 250 GiB,
// blocks of 512 bytes, 1 MiB per request. Other fields stay zero.
type Config struct {
	Geometry block.Geometry
}

// Device is a block.Device. Every loop may open a queue.
type Device struct{ geometry block.Geometry }

// New makes a Device. The error is that of Geometry.Validate.
func New(cfg Config) (*Device, error) {
	g := cfg.Geometry
	if g.Sectors == 0 {
		g.Sectors = 250 << 30 >> block.SectorShift
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
	return &Device{geometry: g}, g.Validate()
}

// Geometry returns the geometry of Config with its defaults.
func (d *Device) Geometry() block.Geometry { return d.geometry }

// OpenQueue makes a queue. It fails only if there is not enough memory.
func (d *Device) OpenQueue(_ int, cfg block.QueueConfig) (block.Queue, error) {
	mem, err := hostmem.Map(cfg.Depth * cfg.MaxIO)
	if err != nil {
		return nil, err
	}
	return &queue{geometry: d.geometry, mem: mem, size: cfg.MaxIO, done: make([]block.Result, 0, cfg.Depth)}, nil
}

// queue completes requests in the order of their submission.
type queue struct {
	geometry block.Geometry
	mem      []byte
	size     int
	done     []block.Result // results; those from next on are not reaped
	next     int
}

func (q *queue) Buffer(tag uint16) []byte {
	off := int(tag) * q.size
	return q.mem[off : off+q.size : off+q.size]
}

func (q *queue) Submit(reqs []block.Request) {
	for i := range reqs {
		r := &reqs[i]
		e := r.Check(q.geometry.Sectors, q.geometry.LogicalBlock, q.size)
		q.done = append(q.done, block.Result{Tag: r.Tag, Errno: uint16(e)})
	}
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
		return errors.New("close null queue: requests are in flight")
	}
	return hostmem.Unmap(q.mem)
}
