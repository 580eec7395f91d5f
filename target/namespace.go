package target

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"ublk-nvmeof/nvme"
)

// NamespaceConfig describes a Namespace.
type NamespaceConfig struct {
	NSID      uint32    // 1..MaxNamespaces; 0: the lowest free id
	Store     Store     // required; the caller closes it, see [Namespace.Drained]
	BlockSize int       // bytes, a power of two from 512 to 4096; 0: 512. The size of the store must be a multiple
	UUID      nvme.UUID // zero: see Identity
	// Identity, the NQN and the NSID determine the UUID if UUID is zero, so that
	// the namespace has the same UUID after a restart of the target, as hosts
	// expect. If Identity is empty, the UUID is random.
	Identity string
	NoUUID   bool     // the namespace has no UUID
	NGUID    [16]byte // zero: none
	EUI64    [8]byte  // zero: none
	ReadOnly bool
	ANAGroup uint32 // 1..MaxANAGroups; 0: 1
}

// Namespace is a namespace of a Subsystem.
type Namespace struct {
	subsystem *Subsystem
	cfg       NamespaceConfig
	shift     uint8         // log2 of the block size
	group     atomic.Uint32 // ANA group
	blocks    atomic.Uint64
	readOnly  atomic.Bool
	sizeMu    sync.Mutex // for changes of blocks

	reservations reservations
}

// NSID returns the id of the namespace.
func (n *Namespace) NSID() uint32 { return n.cfg.NSID }

// UUID returns the UUID of the namespace, or zero if it has none.
func (n *Namespace) UUID() nvme.UUID { return n.cfg.UUID }

// identitySpace is the name space of all UUIDs that are derived from names.
var identitySpace = nvme.UUID{0x8a, 0x4e, 0x0e, 0x2b, 0x6c, 0x51, 0x4f, 0x0d, 0x9b, 0x7c, 0x36, 0x1d, 0xe0, 0x5a, 0x42, 0x97}

func (s *Subsystem) newNamespace(cfg NamespaceConfig) (*Namespace, error) {
	if cfg.BlockSize == 0 {
		cfg.BlockSize = 512
	}
	switch {
	case cfg.NoUUID:
		cfg.UUID = nvme.UUID{}
	case cfg.UUID.IsZero() && cfg.Identity != "":
		cfg.UUID = nvme.NameUUID(identitySpace, fmt.Sprintf("%s\n%d\n%s", s.cfg.NQN, cfg.NSID, cfg.Identity))
	case cfg.UUID.IsZero():
		cfg.UUID = nvme.NewUUID()
	}
	if cfg.ANAGroup == 0 {
		cfg.ANAGroup = 1
	}
	n := &Namespace{subsystem: s, cfg: cfg}
	for 1<<n.shift < cfg.BlockSize {
		n.shift++
	}
	switch {
	case cfg.Store == nil:
		return nil, errors.New("namespace: no store")
	case cfg.BlockSize < 512 || cfg.BlockSize > 4096 || 1<<n.shift != cfg.BlockSize:
		return nil, fmt.Errorf("namespace: block size of %d bytes is not a power of two from 512 to 4096", cfg.BlockSize)
	case cfg.NSID > MaxNamespaces:
		return nil, fmt.Errorf("namespace: id %d is above %d", cfg.NSID, MaxNamespaces)
	case cfg.ANAGroup > MaxANAGroups:
		return nil, fmt.Errorf("namespace: ana group %d is above %d", cfg.ANAGroup, MaxANAGroups)
	}
	n.group.Store(cfg.ANAGroup)
	n.readOnly.Store(cfg.ReadOnly)
	size := cfg.Store.Size()
	if err := n.checkSize(size); err != nil {
		return nil, err
	}
	n.blocks.Store(uint64(size) >> n.shift)
	return n, nil
}

// checkSize fails unless size is a whole number of blocks, and at least one.
func (n *Namespace) checkSize(size int64) error {
	if block := int64(1) << n.shift; size < block || size%block != 0 {
		return fmt.Errorf("namespace: size of %d bytes is not a positive multiple of the block size, %d bytes", size, block)
	}
	return nil
}

// Drained waits until no command uses the store of a namespace that was removed or
// replaced. Then the store may be closed. It fails only if ctx ends.
func (n *Namespace) Drained(ctx context.Context) error {
	return n.subsystem.target.drained(ctx)
}

// Revalidate reads the store's size, rounded down to whole blocks, and notifies the
// hosts if it has changed.
func (n *Namespace) Revalidate() {
	n.sizeMu.Lock()
	defer n.sizeMu.Unlock()
	n.revalidate(n.blocks.Load())
}

// revalidate sets the number of blocks to the size of the store, and notifies the hosts
// if it differs from known.
func (n *Namespace) revalidate(known uint64) {
	blocks := uint64(max(0, n.cfg.Store.Size())) >> n.shift
	n.blocks.Store(blocks)
	if blocks != known {
		n.subsystem.notify(eventNamespace, n.cfg.NSID)
	}
}

// Resize calls change, which sets the size of the store to size bytes, and notifies the
// hosts. If the namespace shrinks, Resize first waits until no command uses the removed
// part, and flushes the store. It fails if ctx ends meanwhile. After an error the
// namespace has the size of the store.
func (n *Namespace) Resize(ctx context.Context, size int64, change func() error) error {
	if err := n.checkSize(size); err != nil {
		return err
	}
	n.sizeMu.Lock()
	defer n.sizeMu.Unlock()
	known := n.blocks.Load()
	var err error
	if blocks := uint64(size) >> n.shift; blocks < known {
		n.blocks.Store(blocks)
		if err = n.subsystem.target.drained(ctx); err == nil {
			err = n.cfg.Store.Flush()
		}
	}
	if err == nil {
		err = change()
	}
	n.revalidate(known)
	return err
}

// ReadOnly reports whether the namespace is protected from changes.
func (n *Namespace) ReadOnly() bool { return n.readOnly.Load() }

// SetReadOnly sets or clears write protection and notifies the hosts, like the
// Namespace Write Protection feature.
func (n *Namespace) SetReadOnly(on bool) {
	if n.readOnly.Swap(on) != on {
		n.subsystem.notify(eventNamespace, n.cfg.NSID)
	}
}

// access returns the error status that the ANA state gives to commands over a port, or
// success.
func (n *Namespace) access(p *Port) nvme.Status {
	switch nvme.ANAState(n.subsystem.ana[p.index][n.group.Load()-1].Load()) {
	case nvme.ANAInaccessible:
		return nvme.StatusANAInaccessible
	case nvme.ANAPersistentLoss:
		return nvme.StatusANAPersistentLoss
	case nvme.ANAChange:
		return nvme.StatusANATransition
	}
	return nvme.StatusSuccess
}
