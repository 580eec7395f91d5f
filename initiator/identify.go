package initiator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// maxTransfer is the largest I/O that is offered, even if the controller accepts more.
const maxTransfer = 1 << 20

// badDataError means that an answer of the target makes no sense. The next answer may be
// better.
type badDataError struct{ error }

func badData(format string, args ...any) error { return &badDataError{fmt.Errorf(format, args...)} }

func (e *badDataError) Unwrap() error { return e.error }

// errInactive means that a namespace id does not name an active namespace.
var errInactive = errors.New("namespace is not active")

// refused reports whether the controller lacks what the command asks for, and will lack
// it next time, too. Any other error status may be temporary.
func refused(err error) bool {
	var s nvme.Status
	if !errors.As(err, &s) {
		return false
	}
	return s.DNR() || s.Code() == nvme.StatusInvalidOpcode || s.Code() == nvme.StatusInvalidField
}

// inactive reports whether err is the status for a namespace id without a namespace.
func inactive(err error) bool {
	var s nvme.Status
	return errors.As(err, &s) && s.Code() == nvme.StatusInvalidNamespace
}

// activeNamespaces reads the list of active namespaces page by page.
func (c *Controller) activeNamespaces(ctx context.Context, a *association) ([]uint32, error) {
	most := a.identify.NN()
	if n := a.identify.MNAN(); n > 0 {
		most = min(most, n)
	}
	var all []uint32
	for from := uint32(0); ; {
		var page [adminPage]byte
		if err := a.admin.identify(ctx, nvme.CNSActiveNSList, from, &page); err != nil {
			return nil, err
		}
		ids, err := nvme.ActiveNSListAt(page[:]).NSIDs()
		switch {
		case err != nil:
			return nil, badData("%w", err)
		case len(ids) > 0 && ids[0] <= from:
			return nil, badData("namespace %d is in the list after %d", ids[0], from)
		}
		all = append(all, ids...)
		switch {
		case len(all) > maxNamespaces && uint64(len(all)) > uint64(most):
			return nil, badData("the list has more than the %d namespaces that the controller can have", most)
		case len(all) > maxNamespaces:
			return all[:maxNamespaces], nil
		case len(ids) < adminPage/4:
			return all, nil
		}
		from = ids[len(ids)-1]
	}
}

// identifyLimits reads the limits of the NVM command set. If known is false, they must be
// read again.
func (c *Controller) identifyLimits(ctx context.Context, a *association) (limits *nvme.IdentifyControllerNVM, known bool, err error) {
	limits = new(nvme.IdentifyControllerNVM)
	cmd := nvme.Command{}
	cmd.SetIdentify(nvme.CNSControllerCSI, 0, nvme.CSINVM)
	_, err = a.admin.exec(ctx, &cmd, nil, limits[:])
	switch {
	case err == nil:
		return limits, true, nil
	case refused(err):
		return limits, true, nil // older than the command
	}
	return limits, false, c.tolerate(a, "identify NVM limits", err)
}

// UnusableError means that a namespace cannot be served as a block device.
type UnusableError struct{ Reason string }

func (e *UnusableError) Error() string { return "unusable: " + e.Reason }

// identifyNamespace reads the properties of a namespace. Errors: errInactive,
// *UnusableError, and others after which the namespace remains unknown.
func (c *Controller) identifyNamespace(ctx context.Context, a *association, id uint32, limits *nvme.IdentifyControllerNVM) (*finding, error) {
	f := &finding{id: id, segments: a.segments()}
	var page [adminPage]byte
	err := a.admin.identify(ctx, nvme.CNSNamespaceDescriptors, id, &page)
	switch {
	case err == nil:
		if f.ids, err = nvme.ParseNamespaceDescriptors(page[:]); err != nil {
			return nil, badData("identification descriptors: %w", err)
		}
	case inactive(err):
		return nil, errInactive
	case !refused(err):
		return nil, fmt.Errorf("identification descriptors: %w", err)
	}
	if csi := f.ids.CSI; csi != nvme.CSINVM {
		return nil, &UnusableError{fmt.Sprintf("command set %d is not NVM", csi)}
	}
	var id0 nvme.IdentifyNamespace
	err = a.admin.identify(ctx, nvme.CNSNamespace, id, (*[adminPage]byte)(&id0))
	switch {
	case inactive(err):
		return nil, errInactive
	case err != nil:
		return nil, err
	case id0.NSZE() == 0:
		return nil, errInactive // the structure of an inactive namespace is zeroes
	}
	// Controllers without descriptors have the identifiers here.
	f.ids = union(f.ids, nvme.NamespaceIDs{NGUID: id0.NGUID(), EUI64: id0.EUI64()})
	if f.geometry, err = geometryOf(a, &id0, limits); err != nil {
		return nil, err
	}
	f.shared, f.group = id0.NMIC()&1 != 0, id0.ANAGRPID()
	f.used = min(id0.NUSE(), id0.NSZE()) * uint64(f.geometry.LogicalBlock)
	if err := c.identifyIndependent(ctx, a, f); err != nil {
		return nil, fmt.Errorf("properties of any command set: %w", err)
	}
	f.deallocateZeroes = id0.WriteZeroesDEAC() && id0.DeallocatedRead() == nvme.DLFEATZeroes
	return f, nil
}

// identifyIndependent reads the properties that do not depend on the command set, which
// newer controllers have. They can say that the namespace has no volatile cache although
// the controller has one.
func (c *Controller) identifyIndependent(ctx context.Context, a *association, f *finding) error {
	if a.version < nvme.NewVersion(2, 0, 0) && !a.cap.CRIMS() {
		return nil
	}
	var id nvme.IdentifyNSIndependent
	err := a.admin.identify(ctx, nvme.CNSNSIndependent, f.id, (*[adminPage]byte)(&id))
	if errors.As(err, new(nvme.Status)) {
		return nil // assume that the cache exists
	}
	if id.NSFEAT()&nvme.NSIndependentNoVWC != 0 {
		f.geometry.VolatileCache = false
	}
	return err
}

// geometryOf translates identify data in the way of Linux' nvme_update_disk_info.
func geometryOf(a *association, id *nvme.IdentifyNamespace, limits *nvme.IdentifyControllerNVM) (block.Geometry, error) {
	var g block.Geometry
	format := id.Format()
	switch {
	case id.NCAP() == 0:
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
		// NLB has 16 bits. The limit is that of a transfer unless the controller
		// names another.
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
