package initiator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync/atomic"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// maxTransfer is the largest I/O offered, whatever more the controller takes.
const maxTransfer = 1 << 20

// Namespace is a namespace of the subsystem: a block.Device.
type Namespace struct {
	ctrl             *Controller
	id               uint32
	sectorShift      uint8 // log2 of 512-byte sectors per logical block
	deallocateZeroes bool  // Write Zeroes may deallocate and still read zeroes
	geometry         block.Geometry
	ids              nvme.NamespaceIDs
	gone             atomic.Bool // it is not what it was: requests fail
}

// NSID is the namespace id.
func (ns *Namespace) NSID() uint32 { return ns.id }

// IDs are the globally unique identifiers of the namespace, as far as it has
// them.
func (ns *Namespace) IDs() nvme.NamespaceIDs { return ns.ids }

// Geometry implements block.Device.
func (ns *Namespace) Geometry() block.Geometry { return ns.geometry }

// scan identifies the active namespaces. One that cannot be used as a block
// device is left out, and the log says why.
func (c *Controller) scan(ctx context.Context, a *association) ([]*Namespace, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.AdminTimeout)
	defer cancel()
	var limits nvme.IdentifyControllerNVM
	cmd := nvme.Command{}
	cmd.SetIdentify(nvme.CNSControllerCSI, 0, nvme.CSINVM)
	if _, err := a.admin.exec(ctx, &cmd, nil, limits[:]); err != nil && !errors.As(err, new(nvme.Status)) {
		return nil, fmt.Errorf("identify NVM limits: %w", err)
	}
	ids, err := c.activeNamespaces(ctx, a)
	if err != nil {
		return nil, err
	}
	var found []*Namespace
	for _, id := range ids {
		ns, err := c.identifyNamespace(ctx, a, id, &limits)
		var unusable *UnusableError
		switch {
		case errors.As(err, &unusable):
			c.cfg.Log.Warn("namespace left out", "nsid", id, "reason", unusable.Reason)
		case err != nil:
			return nil, fmt.Errorf("namespace %d: %w", id, err)
		default:
			found = append(found, ns)
		}
	}
	return found, nil
}

// rescan looks whether the namespaces are still what they were. One that is not
// fails its requests from now on: what they were meant for is gone, and what
// stands in its place must not be written to.
func (c *Controller) rescan(ctx context.Context, a *association) error {
	found, err := c.scan(ctx, a)
	if err != nil {
		return err
	}
	now := make(map[uint32]*Namespace, len(found))
	for _, ns := range found {
		now[ns.id] = ns
	}
	for _, ns := range c.namespaces {
		switch is := now[ns.id]; {
		case is == nil:
			ns.lose("it is not there any more")
		case is.ids != ns.ids:
			ns.lose("another namespace has its id")
		case is.geometry.LogicalBlock != ns.geometry.LogicalBlock:
			ns.lose("its block size changed")
		case is.geometry.Sectors < ns.geometry.Sectors:
			ns.lose("it shrank")
		default:
			ns.gone.Store(false)
		}
	}
	return nil
}

func (ns *Namespace) lose(why string) {
	ns.gone.Store(true)
	ns.ctrl.cfg.Log.Error("namespace lost", "nsid", ns.id, "reason", why)
}

// activeNamespaces reads the list of active namespaces page by page.
func (c *Controller) activeNamespaces(ctx context.Context, a *association) ([]uint32, error) {
	var all []uint32
	for from := uint32(0); ; {
		var page [adminPage]byte
		if err := a.admin.identify(ctx, nvme.CNSActiveNSList, from, &page); err != nil {
			return nil, fmt.Errorf("list namespaces: %w", err)
		}
		ids, err := nvme.ActiveNSListAt(page[:]).NSIDs()
		switch {
		case err != nil:
			return nil, fmt.Errorf("list namespaces: %w", err)
		case len(ids) > 0 && ids[0] <= from:
			return nil, fmt.Errorf("list namespaces: %d in the list after %d", ids[0], from)
		}
		all = append(all, ids...)
		if len(ids) < adminPage/4 {
			return all, nil
		}
		from = ids[len(ids)-1]
	}
}

// UnusableError is a namespace that cannot be a block device here.
type UnusableError struct{ Reason string }

func (e *UnusableError) Error() string { return "unusable: " + e.Reason }

func (c *Controller) identifyNamespace(ctx context.Context, a *association, id uint32, limits *nvme.IdentifyControllerNVM) (*Namespace, error) {
	ns := &Namespace{ctrl: c, id: id}
	var page [adminPage]byte
	err := a.admin.identify(ctx, nvme.CNSNamespaceDescriptors, id, &page)
	switch {
	case err == nil:
		if ns.ids, err = nvme.ParseNamespaceDescriptors(page[:]); err != nil {
			return nil, fmt.Errorf("identification descriptors: %w", err)
		}
	case !errors.As(err, new(nvme.Status)):
		return nil, fmt.Errorf("identification descriptors: %w", err)
	}
	if csi := ns.ids.CSI; csi != nvme.CSINVM {
		return nil, &UnusableError{fmt.Sprintf("command set %d is not NVM", csi)}
	}
	var id0 nvme.IdentifyNamespace
	if err := a.admin.identify(ctx, nvme.CNSNamespace, id, (*[adminPage]byte)(&id0)); err != nil {
		return nil, err
	}
	if ns.geometry, err = geometryOf(a, &id0, limits); err != nil {
		return nil, err
	}
	if err := c.identifyIndependent(ctx, a, ns); err != nil {
		return nil, fmt.Errorf("properties of any command set: %w", err)
	}
	ns.sectorShift = uint8(bits.TrailingZeros32(ns.geometry.LogicalBlock >> block.SectorShift))
	ns.deallocateZeroes = id0.WriteZeroesDEAC() && id0.DeallocatedRead() == nvme.DLFEATZeroes
	return ns, nil
}

// identifyIndependent learns what newer controllers say of a namespace beside its
// command set: that it has no volatile cache, whatever the controller has.
func (c *Controller) identifyIndependent(ctx context.Context, a *association, ns *Namespace) error {
	if a.version < nvme.NewVersion(2, 0, 0) && !a.cap.CRIMS() {
		return nil
	}
	var id nvme.IdentifyNSIndependent
	err := a.admin.identify(ctx, nvme.CNSNSIndependent, ns.id, (*[adminPage]byte)(&id))
	if errors.As(err, new(nvme.Status)) {
		return nil // it does not say
	}
	if id.NSFEAT()&nvme.NSIndependentNoVWC != 0 {
		ns.geometry.VolatileCache = false
	}
	return err
}

// geometryOf translates identify data as Linux' nvme_update_disk_info does.
func geometryOf(a *association, id *nvme.IdentifyNamespace, limits *nvme.IdentifyControllerNVM) (block.Geometry, error) {
	var g block.Geometry
	format := id.Format()
	switch {
	case id.NSZE() == 0 || id.NCAP() == 0:
		return g, &UnusableError{"no capacity"}
	case format.MS != 0:
		return g, &UnusableError{fmt.Sprintf("%d bytes of metadata per block", format.MS)}
	case format.LBADS < 9 || format.LBADS > 12:
		return g, &UnusableError{fmt.Sprintf("block size 2^%d is not 512..4096", format.LBADS)}
	case id.NSZE() > math.MaxUint64>>(format.LBADS):
		return g, &UnusableError{"capacity is beyond 2^64 bytes"}
	}
	lbs := uint32(1) << format.LBADS
	perBlock := lbs >> block.SectorShift
	g = block.Geometry{
		Sectors:       id.NSZE() * uint64(perBlock),
		LogicalBlock:  lbs,
		PhysicalBlock: lbs,
		IOMin:         lbs,
		MaxIO:         maxTransfer,
		VolatileCache: a.identify.VWC()&nvme.VWCPresent != 0,
		ReadOnly:      id.WriteProtected(),
	}
	if n := a.identify.MaxTransfer(a.cap.MPSMIN()); n > 0 {
		g.MaxIO = uint32(min(n, maxTransfer))
	}
	atomically := uint32(1) // blocks
	if n := id.NAWUPF(); n > 0 && id.NSFEAT()&nvme.NSFEATAtomic != 0 {
		atomically = uint32(n) + 1
	}
	if id.OPTPERF()&1 != 0 {
		g.IOMin = lbs * (uint32(id.NPWG()) + 1)
		atomically = min(atomically, uint32(id.NPWG())+1)
		g.IOOpt = lbs * (uint32(id.NOWS()) + 1)
	}
	g.PhysicalBlock = lbs * floorPow2(atomically)
	if n := uint32(id.NOIOB()); n > 0 && n&(n-1) == 0 {
		g.ChunkSectors = n * perBlock
	}
	if a.identify.ONCS()&nvme.ONCSDSM != 0 {
		g.MaxDiscardSectors = math.MaxUint32
		if n := limits.DMRSL(); n > 0 {
			g.MaxDiscardSectors = saturate(uint64(n) * uint64(perBlock))
		}
		g.DiscardGranularity = lbs
		if id.OPTPERF()&1 != 0 {
			g.DiscardGranularity = max(lbs, lbs*(uint32(id.NPDG())+1))
		}
	}
	if a.identify.ONCS()&nvme.ONCSWriteZeroes != 0 {
		// NLB has 16 bits, and the limit is that of a transfer unless the
		// controller names another.
		n := uint64(g.MaxIO) >> block.SectorShift
		if shift := uint(limits.WZSL()); shift > 0 {
			n = uint64(1) << min(shift+3+uint(a.cap.MPSMIN()), 40)
		}
		g.MaxZeroesSectors = saturate(min(n, 65536*uint64(perBlock)))
	}
	if err := g.Validate(); err != nil {
		return g, &UnusableError{err.Error()}
	}
	return g, nil
}

func floorPow2(n uint32) uint32 { return 1 << (bits.Len32(n) - 1) }

func saturate(n uint64) uint32 { return uint32(min(n, math.MaxUint32)) }
