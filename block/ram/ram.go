// Package ram is a block back end that keeps its data in the memory of this process.
// It is the reference for front ends: a read must return what was written. Requests
// are executed at once, on the loop that submits them.
//
// Concurrent requests of several queues to the same sectors mix their data, as on a
// disk.
package ram

import (
	"fmt"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/instant"
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
	regions  instant.Regions // of front ends
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

// Register implements block.Registrar. Nothing but the requests accesses the region.
func (d *Device) Register(mem []byte) (block.Region, error) { return d.regions.Register(mem) }

// OpenQueue implements block.Device. The error is that of block.QueueConfig.Validate, or
// that there is not enough memory.
func (d *Device) OpenQueue(_ int, cfg block.QueueConfig) (block.Queue, error) {
	return instant.Open(cfg, d.geometry, &d.regions, d.execute)
}

// execute executes a request that was checked. data has as many bytes as a read or write.
func (d *Device) execute(r *block.Request, data []byte) {
	disk := d.mem[r.Sector<<block.SectorShift:][:uint64(r.Sectors)<<block.SectorShift]
	switch r.Op {
	case block.OpRead:
		copy(data, disk)
	case block.OpWrite:
		copy(disk, data)
	default: // a discard or write zeroes
		clear(disk)
	}
}
