package target

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"ublk-nvmeof/nvme"
)

const (
	defaultModel = "ublk-nvmeof target"
	firmware     = "1"

	// MaxNamespaces is the number of namespaces of a subsystem and the largest
	// namespace id.
	MaxNamespaces = 1024
	// MaxANAGroups is the number of ANA groups of a subsystem and the largest
	// group id.
	MaxANAGroups = 32
)

// SubsystemConfig describes a Subsystem.
type SubsystemConfig struct {
	NQN        string   // required
	Serial     string   // at most 20 bytes; empty: random
	Model      string   // at most 40 bytes; empty: a name of this software
	AllowAny   bool     // every host may connect
	AllowHosts []string // NQNs of those that may, without AllowAny
	MaxQueues  int      // I/O queues per controller, 1..65535; 0: 128. See SetMaxQueues
}

func (c *SubsystemConfig) setDefaults() error {
	if err := nvme.ValidateNQN(c.NQN); err != nil {
		return fmt.Errorf("subsystem: %w", err)
	}
	if c.Serial == "" {
		var b [10]byte
		_, _ = rand.Read(b[:]) // never fails
		c.Serial = hex.EncodeToString(b[:])
	}
	if c.Model == "" {
		c.Model = defaultModel
	}
	if c.MaxQueues == 0 {
		c.MaxQueues = DefaultMaxQueues
	}
	switch {
	case len(c.Serial) > 20:
		return fmt.Errorf("subsystem: serial number of %d bytes, at most 20 fit", len(c.Serial))
	case len(c.Model) > 40:
		return fmt.Errorf("subsystem: model number of %d bytes, at most 40 fit", len(c.Model))
	case c.MaxQueues < 1 || c.MaxQueues > nvme.MaxQueues:
		return fmt.Errorf("subsystem: %d I/O queues are not 1..%d", c.MaxQueues, nvme.MaxQueues)
	}
	for _, host := range c.AllowHosts {
		if err := nvme.ValidateNQN(host); err != nil {
			return fmt.Errorf("subsystem: host %q: %w", host, err)
		}
	}
	c.AllowHosts = slices.Clone(c.AllowHosts)
	return nil
}

// Subsystem is an NVM subsystem.
type Subsystem struct {
	target    *Target
	cfg       SubsystemConfig
	discovery bool
	maxQueues atomic.Int32
	// namespaces is what hosts see of table, replaced as a whole.
	namespaces atomic.Pointer[[]*Namespace]
	// ana holds the states by group id less one, read on the I/O path.
	ana [MaxANAGroups]atomic.Uint32

	mu         sync.Mutex   // guards what follows, and changes of what is above
	table      []*Namespace // by namespace id less one
	anaChanges uint64
	anaCounts  [MaxANAGroups]uint64
}

func newSubsystem(t *Target, cfg SubsystemConfig) *Subsystem {
	s := &Subsystem{target: t, cfg: cfg}
	s.maxQueues.Store(int32(cfg.MaxQueues))
	s.namespaces.Store(&[]*Namespace{})
	for i := range s.ana {
		s.ana[i].Store(uint32(nvme.ANAOptimized))
	}
	return s
}

// NQN is the name of the subsystem.
func (s *Subsystem) NQN() string { return s.cfg.NQN }

// SetMaxQueues changes how many I/O queues (1..65535) a controller gets. Hosts
// see it when they next ask, which is when they connect anew; queues that exist
// stay. To have them connect anew, call DropControllers.
func (s *Subsystem) SetMaxQueues(n int) error {
	if n < 1 || n > nvme.MaxQueues {
		return fmt.Errorf("subsystem: %d I/O queues are not 1..%d", n, nvme.MaxQueues)
	}
	s.maxQueues.Store(int32(n))
	return nil
}

// DropControllers ends all connections to the subsystem.
func (s *Subsystem) DropControllers() {
	for _, c := range s.target.controllers.of(s) {
		c.fail("controllers are dropped")
	}
}

func (s *Subsystem) allows(host string) bool {
	return s.cfg.AllowAny || slices.Contains(s.cfg.AllowHosts, host)
}

// notify tells every controller of an event.
func (s *Subsystem) notify(e event, nsid uint32) {
	for _, c := range s.target.controllers.of(s) {
		c.notify(e, nsid)
	}
}

// NamespaceConfig describes a Namespace.
type NamespaceConfig struct {
	NSID      uint32    // 1..MaxNamespaces; 0: the lowest that is free
	Store     Store     // required; stays the caller's, see [Namespace.Drained]
	BlockSize int       // bytes, a power of two from 512 to 4096; 0: 512. The size of the store is a multiple
	UUID      nvme.UUID // zero: see Identity
	// Identity is what the UUID is made of if that is zero, together with the NQN
	// and the NSID: the same three give the same UUID at every start, as hosts
	// expect of a target that was restarted. Empty: the UUID is random.
	Identity string
	NoUUID   bool     // hosts are told no UUID
	NGUID    [16]byte // zero: none
	EUI64    [8]byte  // zero: none
	ReadOnly bool
	ANAGroup uint32 // 1..MaxANAGroups; 0: 1
}

// Namespace is a namespace of a Subsystem.
type Namespace struct {
	subsystem *Subsystem
	cfg       NamespaceConfig
	shift     uint8 // log2 of the block size
	group     *atomic.Uint32
	blocks    atomic.Uint64
	readOnly  atomic.Bool
	sizeMu    sync.Mutex // for changes of blocks
}

// NSID is the id of the namespace.
func (n *Namespace) NSID() uint32 { return n.cfg.NSID }

// UUID is the UUID of the namespace, zero if it has none.
func (n *Namespace) UUID() nvme.UUID { return n.cfg.UUID }

// identitySpace is the name space of the UUIDs that are made of an Identity.
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
		return nil, fmt.Errorf("namespace: block size of %d bytes is no power of two from 512 to 4096", cfg.BlockSize)
	case cfg.NSID > MaxNamespaces:
		return nil, fmt.Errorf("namespace: id %d is above %d", cfg.NSID, MaxNamespaces)
	case cfg.ANAGroup > MaxANAGroups:
		return nil, fmt.Errorf("namespace: ana group %d is above %d", cfg.ANAGroup, MaxANAGroups)
	}
	n.group = &s.ana[cfg.ANAGroup-1]
	n.readOnly.Store(cfg.ReadOnly)
	size := cfg.Store.Size()
	if err := n.checkSize(size); err != nil {
		return nil, err
	}
	n.blocks.Store(uint64(size) >> n.shift)
	return n, nil
}

// checkSize refuses a size that is no whole number of blocks, or none.
func (n *Namespace) checkSize(size int64) error {
	if block := int64(1) << n.shift; size < block || size%block != 0 {
		return fmt.Errorf("namespace: size of %d bytes is no multiple of the block size, %d, above 0", size, block)
	}
	return nil
}

// AddNamespace adds a namespace and tells the hosts. Errors are of the
// configuration, or an id that is taken.
func (s *Subsystem) AddNamespace(cfg NamespaceConfig) (*Namespace, error) {
	return s.setNamespace(cfg, false)
}

// ReplaceNamespace puts another namespace in the place of the one with the id
// of cfg, and tells the hosts. For commands to the old one it is as if that were
// removed.
func (s *Subsystem) ReplaceNamespace(cfg NamespaceConfig) (*Namespace, error) {
	return s.setNamespace(cfg, true)
}

func (s *Subsystem) setNamespace(cfg NamespaceConfig, replace bool) (*Namespace, error) {
	if s.discovery {
		return nil, errors.New("namespace: the discovery subsystem has none")
	}
	s.mu.Lock()
	table := slices.Clone(s.table)
	if cfg.NSID == 0 {
		i := slices.Index(table, nil)
		if i < 0 {
			i = len(table)
		}
		cfg.NSID = uint32(i) + 1
	}
	n, err := s.newNamespace(cfg)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	for len(table) < int(cfg.NSID) {
		table = append(table, nil)
	}
	slot := &table[cfg.NSID-1]
	if (*slot != nil) != replace {
		s.mu.Unlock()
		return nil, fmt.Errorf("namespace: id %d exists: %t", cfg.NSID, !replace)
	}
	*slot = n
	s.publish(table)
	s.mu.Unlock()
	s.notify(eventNamespace, cfg.NSID)
	return n, nil
}

// RemoveNamespace removes a namespace and tells the hosts. Commands that are inside
// its store go on, see [Namespace.Drained]; others find it gone.
func (s *Subsystem) RemoveNamespace(nsid uint32) error {
	s.mu.Lock()
	if i := nsid - 1; uint64(i) >= uint64(len(s.table)) || s.table[i] == nil { // 0 wraps round
		s.mu.Unlock()
		return fmt.Errorf("namespace: no id %d", nsid)
	}
	table := slices.Clone(s.table)
	table[nsid-1] = nil
	s.publish(table)
	s.mu.Unlock()
	s.notify(eventNamespace, nsid)
	return nil
}

// publish makes a table the one that hosts see, unless namespaces are hidden. It is
// not changed any more. The lock is held.
func (s *Subsystem) publish(table []*Namespace) {
	s.table = table
	if s.target.faults.hidden.Load() {
		table = nil
	}
	s.namespaces.Store(&table)
}

// republish follows a change of what is hidden, and tells the hosts.
func (s *Subsystem) republish() {
	s.mu.Lock()
	table := s.table
	s.publish(table)
	s.mu.Unlock()
	for _, n := range table {
		if n != nil {
			s.notify(eventNamespace, n.cfg.NSID)
		}
	}
}

// namespace finds a namespace, nil if there is none.
func (s *Subsystem) namespace(nsid uint32) *Namespace {
	table := *s.namespaces.Load()
	if i := nsid - 1; uint64(i) < uint64(len(table)) { // 0 wraps round
		return table[i]
	}
	return nil
}

// active lists the ids of namespaces above nsid.
func (s *Subsystem) active(nsid uint32) []uint32 {
	var ids []uint32
	for _, n := range *s.namespaces.Load() {
		if n != nil && n.cfg.NSID > nsid {
			ids = append(ids, n.cfg.NSID)
		}
	}
	return ids
}

// flush makes all that was written to the namespaces durable.
func (s *Subsystem) flush() error {
	s.mu.Lock()
	table := s.table
	s.mu.Unlock()
	var errs []error
	for _, n := range table {
		if n != nil {
			errs = append(errs, n.cfg.Store.Flush())
		}
	}
	return errors.Join(errs...)
}

// Drained waits until no command uses the store of a namespace that was removed or
// replaced. After that the store may be closed. The error is that of ctx.
func (n *Namespace) Drained(ctx context.Context) error {
	return n.subsystem.target.drained(ctx)
}

// Revalidate takes notice of the store's size, as far as it is whole blocks, and
// tells the hosts if it changed.
func (n *Namespace) Revalidate() {
	n.sizeMu.Lock()
	defer n.sizeMu.Unlock()
	n.revalidate(n.blocks.Load())
}

// revalidate is Revalidate for hosts that know of so many blocks.
func (n *Namespace) revalidate(known uint64) {
	blocks := uint64(max(0, n.cfg.Store.Size())) >> n.shift
	n.blocks.Store(blocks)
	if blocks != known {
		n.subsystem.notify(eventNamespace, n.cfg.NSID)
	}
}

// Resize lets change give the store another size in bytes, and tells the hosts. If
// it gets smaller, that waits until no command is beyond its end, and nothing of a
// cache; the error is then perhaps that of ctx. After an error the namespace is as
// large as it was.
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

// ReadOnly says whether the namespace is protected from changes.
func (n *Namespace) ReadOnly() bool { return n.readOnly.Load() }

// SetReadOnly protects the namespace from changes, or no longer, and tells the
// hosts. It is what the write protection feature does.
func (n *Namespace) SetReadOnly(on bool) {
	if n.readOnly.Swap(on) != on {
		n.subsystem.notify(eventNamespace, n.cfg.NSID)
	}
}

// SetANAState sets the state of an ANA group (1..MaxANAGroups) on this target,
// and tells the hosts. All groups begin optimized.
func (s *Subsystem) SetANAState(group uint32, state nvme.ANAState) error {
	switch state {
	case nvme.ANAOptimized, nvme.ANANonOptimized, nvme.ANAInaccessible, nvme.ANAPersistentLoss, nvme.ANAChange:
	default:
		return fmt.Errorf("subsystem: %v", state)
	}
	if group < 1 || group > MaxANAGroups {
		return fmt.Errorf("subsystem: ana group %d is not 1..%d", group, MaxANAGroups)
	}
	s.mu.Lock()
	changed := s.ana[group-1].Swap(uint32(state)) != uint32(state)
	if changed {
		s.anaChanges++
		s.anaCounts[group-1] = s.anaChanges
	}
	s.mu.Unlock()
	if changed {
		s.notify(eventANA, 0)
	}
	return nil
}

// anaLog is log page 0Ch; without namespaces if only the groups are asked for.
func (s *Subsystem) anaLog(groupsOnly bool) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var members [MaxANAGroups][]uint32
	groups := 0
	for _, n := range *s.namespaces.Load() {
		if n == nil {
			continue
		}
		m := &members[n.cfg.ANAGroup-1]
		if *m == nil {
			groups++
		}
		*m = append(*m, n.cfg.NSID)
	}
	log := nvme.AppendANAHeader(nil, s.anaChanges, uint16(groups))
	for i, ids := range members {
		if ids == nil {
			continue
		}
		if groupsOnly {
			ids = nil
		}
		log = nvme.AppendANAGroup(log, uint32(i)+1, s.anaCounts[i], nvme.ANAState(s.ana[i].Load()), ids...)
	}
	return log
}

// access is the status of a command to a namespace in this ANA state.
func (n *Namespace) access() nvme.Status {
	switch nvme.ANAState(n.group.Load()) {
	case nvme.ANAInaccessible:
		return nvme.StatusANAInaccessible
	case nvme.ANAPersistentLoss:
		return nvme.StatusANAPersistentLoss
	case nvme.ANAChange:
		return nvme.StatusANATransition
	}
	return nvme.StatusSuccess
}
