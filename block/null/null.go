// Package null is a block back end that does nothing. Every request that block.Request.Check
// accepts succeeds at once, and a read returns the old contents of the buffer or region. The package
// serves to measure a front end without a back end.
package null

import (
	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/instant"
)

// Config configures New. Zero fields of the geometry get defaults: 250 GiB,
// blocks of 512 bytes, 1 MiB per request. Other fields stay zero.
type Config struct {
	Geometry block.Geometry
}

// Device is a block.Device. Every loop may open a queue.
type Device struct {
	geometry block.Geometry
	regions  instant.Regions // of front ends
}

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

// Register implements block.Registrar. Nothing but the requests accesses the region.
func (d *Device) Register(mem []byte) (block.Region, error) { return d.regions.Register(mem) }

// OpenQueue implements block.Device. The error is that of block.QueueConfig.Validate, or
// that there is not enough memory.
func (d *Device) OpenQueue(_ int, cfg block.QueueConfig) (block.Queue, error) {
	return instant.Open(cfg, d.geometry, &d.regions, func(*block.Request, []byte) {})
}
