package initiator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
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
	ids              nvme.NamespaceIDs
	gone             atomic.Bool // it is not what it was: requests fail

	mu       sync.Mutex // guards what follows
	geometry block.Geometry
}

// NSID is the namespace id.
func (ns *Namespace) NSID() uint32 { return ns.id }

// IDs are the globally unique identifiers of the namespace, as far as it has
// them.
func (ns *Namespace) IDs() nvme.NamespaceIDs { return ns.ids }

// Geometry implements block.Device. Size and write protection are those of the
// last look.
func (ns *Namespace) Geometry() block.Geometry {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.geometry
}

func (ns *Namespace) setGeometry(g block.Geometry) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.geometry = g
}

// Change is what happened to a namespace.
type Change uint8

// Changes.
const (
	ChangeUnset     Change = iota
	Added                  // it is new, or it is back
	Removed                // it is not there any more, or not what it was: requests fail with ENODEV
	Resized                // Geometry has the new size
	WriteProtection        // Geometry says whether it may be written to now
)

var changeNames = [...]string{"unset", "added", "removed", "resized", "write protection changed"}

func (c Change) String() string {
	if int(c) < len(changeNames) {
		return changeNames[c]
	}
	return fmt.Sprintf("change %d", c)
}

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
		case errors.Is(err, nvme.StatusInvalidNamespace), errors.Is(err, nvme.StatusInvalidNamespace|nvme.StatusDNR):
			// Removed since it was listed.
		case err != nil:
			return nil, fmt.Errorf("namespace %d: %w", id, err)
		default:
			found = append(found, ns)
		}
	}
	return found, nil
}

// is says whether two looks were at the same namespace, in a state that a user of
// the first may go on with. The error says why not.
func (ns *Namespace) is(now *Namespace) error {
	switch was := ns.Geometry(); {
	case now == nil:
		return errors.New("it is not there any more")
	case ns.ids != now.ids:
		return errors.New("another namespace has its id")
	case was.LogicalBlock != now.geometry.LogicalBlock:
		return fmt.Errorf("its block size was %d and is %d", was.LogicalBlock, now.geometry.LogicalBlock)
	}
	return nil
}

// rescan looks what the namespaces are now. Requests for one that is not what it
// was fail from now on: what they were meant for is gone, and what stands in its
// place must not be written to.
func (c *Controller) rescan(ctx context.Context, a *association) error {
	found, err := c.scan(ctx, a)
	if err != nil {
		return err
	}
	now := make(map[uint32]*Namespace, len(found))
	for _, ns := range found {
		now[ns.id] = ns
	}
	all := c.Namespaces()
	for _, ns := range all {
		is := now[ns.id]
		if err := ns.is(is); err != nil {
			if !ns.gone.Swap(true) {
				c.changed(ns, Removed, err.Error())
			}
			continue
		}
		delete(now, ns.id)
		c.update(ns, is.geometry)
	}
	for _, ns := range found {
		if now[ns.id] == ns {
			all = append(all, ns)
			c.changed(ns, Added, "it is new")
		}
	}
	c.mu.Lock()
	c.namespaces = all
	c.mu.Unlock()
	return nil
}

// update takes over what may change of a namespace that is still the same.
func (c *Controller) update(ns *Namespace, now block.Geometry) {
	was := ns.Geometry()
	next := was
	next.Sectors, next.ReadOnly = now.Sectors, now.ReadOnly
	ns.setGeometry(next)
	if ns.gone.Swap(false) {
		c.changed(ns, Added, "it is back")
	}
	if was.Sectors != now.Sectors {
		c.changed(ns, Resized, fmt.Sprintf("from %d to %d sectors", was.Sectors, now.Sectors))
	}
	if was.ReadOnly != now.ReadOnly {
		c.changed(ns, WriteProtection, fmt.Sprintf("read-only %t", now.ReadOnly))
	}
}

// changed tells whoever wants to know.
func (c *Controller) changed(ns *Namespace, what Change, detail string) {
	c.cfg.Log.Warn("namespace "+what.String(), "nsid", ns.id, "detail", detail) //nolint:sloglint // one of a few
	if c.cfg.Changed != nil {
		c.cfg.Changed(ns, what)
	}
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
