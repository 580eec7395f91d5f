package target

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	Serial     string   // at most 20 bytes of printable ASCII; empty: derived from the NQN, the same at every start
	Model      string   // at most 40 bytes of printable ASCII; empty: a name of this software
	AllowAny   bool     // every host may connect
	AllowHosts []string // NQNs of the hosts that may connect without AllowAny
	MaxQueues  int      // I/O queues per controller, 1..65535; 0: 128. See SetMaxQueues
}

func (c *SubsystemConfig) setDefaults() error {
	if err := nvme.ValidateNQN(c.NQN); err != nil {
		return fmt.Errorf("subsystem: %w", err)
	}
	if c.Serial == "" {
		id := nvme.NameUUID(identitySpace, c.NQN)
		c.Serial = hex.EncodeToString(id[:10])
	}
	if c.Model == "" {
		c.Model = defaultModel
	}
	if c.MaxQueues == 0 {
		c.MaxQueues = DefaultMaxQueues
	}
	switch {
	case len(c.Serial) > 20:
		return fmt.Errorf("subsystem: serial number has %d bytes; want at most 20", len(c.Serial))
	case len(c.Model) > 40:
		return fmt.Errorf("subsystem: model number has %d bytes; want at most 40", len(c.Model))
	case !printable(c.Serial) || !printable(c.Model):
		return fmt.Errorf("subsystem: serial number %q or model number %q has characters other than printable ASCII", c.Serial, c.Model)
	case c.MaxQueues < 1 || c.MaxQueues > nvme.MaxQueues:
		return fmt.Errorf("subsystem: %d I/O queues; want 1 to %d", c.MaxQueues, nvme.MaxQueues)
	}
	for _, host := range c.AllowHosts {
		if err := nvme.ValidateNQN(host); err != nil {
			return fmt.Errorf("subsystem: host %q: %w", host, err)
		}
	}
	c.AllowHosts = slices.Clone(c.AllowHosts)
	return nil
}

// printable reports whether s consists of printable ASCII characters, as Identify
// requires.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// Subsystem is an NVM subsystem.
type Subsystem struct {
	target    *Target
	cfg       SubsystemConfig
	discovery bool
	maxQueues atomic.Int32
	// namespaces is the part of table that hosts see. It is replaced as a whole.
	namespaces atomic.Pointer[[]*Namespace]
	// ana holds the state of each group over each port, by group id minus one. The I/O
	// path reads it.
	ana [MaxPorts][MaxANAGroups]atomic.Uint32

	mu         sync.Mutex           // guards what follows, and changes of namespaces and ana
	hostAuth   map[string]*HostAuth // by host NQN; replaced as a whole
	table      []*Namespace         // by namespace id minus one
	anaChanges uint64
	anaCounts  [MaxPorts][MaxANAGroups]uint64
}

func newSubsystem(t *Target, cfg SubsystemConfig) *Subsystem {
	s := &Subsystem{target: t, cfg: cfg}
	s.maxQueues.Store(int32(cfg.MaxQueues))
	s.namespaces.Store(&[]*Namespace{})
	for port := range s.ana {
		s.resetANA(port)
	}
	return s
}

// NQN returns the name of the subsystem.
func (s *Subsystem) NQN() string { return s.cfg.NQN }

// SetMaxQueues changes the largest number of I/O queues of a controller, 1..65535.
// It takes effect when a host connects the next time. Call DropControllers to make
// hosts reconnect.
func (s *Subsystem) SetMaxQueues(n int) error {
	if n < 1 || n > nvme.MaxQueues {
		return fmt.Errorf("subsystem: %d I/O queues; want 1 to %d", n, nvme.MaxQueues)
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
	return s.cfg.AllowAny || slices.Contains(s.cfg.AllowHosts, host) || s.authOf(host) != nil
}

// notify notifies every controller of an event.
func (s *Subsystem) notify(e event, nsid uint32) {
	for _, c := range s.target.controllers.of(s) {
		c.notify(e, nsid)
	}
}

// AddNamespace adds a namespace and notifies the hosts. It fails if the configuration
// is wrong or the id is taken.
func (s *Subsystem) AddNamespace(cfg NamespaceConfig) (*Namespace, error) {
	return s.setNamespace(cfg, false)
}

// ReplaceNamespace replaces the namespace with the id of cfg, and notifies the hosts.
// Commands to the old namespace end as after RemoveNamespace.
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
	switch exists := *slot != nil; {
	case exists && !replace:
		s.mu.Unlock()
		return nil, fmt.Errorf("namespace %d exists already", cfg.NSID)
	case !exists && replace:
		s.mu.Unlock()
		return nil, fmt.Errorf("namespace %d does not exist", cfg.NSID)
	}
	*slot = n
	s.publish(table)
	s.mu.Unlock()
	s.notify(eventNamespace, cfg.NSID)
	return n, nil
}

// RemoveNamespace removes a namespace and notifies the hosts. Commands that are
// inside its store continue, see [Namespace.Drained]; all others fail.
func (s *Subsystem) RemoveNamespace(nsid uint32) error {
	s.mu.Lock()
	if i := nsid - 1; uint64(i) >= uint64(len(s.table)) || s.table[i] == nil { // 0 wraps round
		s.mu.Unlock()
		return fmt.Errorf("namespace %d does not exist", nsid)
	}
	table := slices.Clone(s.table)
	table[nsid-1] = nil
	s.publish(table)
	s.mu.Unlock()
	s.notify(eventNamespace, nsid)
	return nil
}

// publish replaces the table of namespaces, which the caller does not change any
// more. Hosts see it unless namespaces are hidden. The caller holds the lock.
func (s *Subsystem) publish(table []*Namespace) {
	s.table = table
	if s.target.faults.hidden.Load() {
		table = nil
	}
	s.namespaces.Store(&table)
}

// republish shows or hides the namespaces, and notifies the hosts.
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

// namespace returns the namespace with this id, or nil.
func (s *Subsystem) namespace(nsid uint32) *Namespace {
	table := *s.namespaces.Load()
	if i := nsid - 1; uint64(i) < uint64(len(table)) { // 0 wraps round
		return table[i]
	}
	return nil
}

// active returns the ids above nsid of the namespaces that hosts see.
func (s *Subsystem) active(nsid uint32) []uint32 {
	var ids []uint32
	for _, n := range *s.namespaces.Load() {
		if n != nil && n.cfg.NSID > nsid {
			ids = append(ids, n.cfg.NSID)
		}
	}
	return ids
}

// flush makes all data durable that was written to the namespaces.
func (s *Subsystem) flush() error {
	s.target.flushes.Add(1) // before the table is read, as in enter
	defer s.target.flushes.Add(-1)
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

// SetANAState sets the state of an ANA group (1..MaxANAGroups) over all ports and notifies the
// hosts. Initially, all groups are optimized.
func (s *Subsystem) SetANAState(group uint32, state nvme.ANAState) error {
	if err := checkANA(group, state); err != nil {
		return err
	}
	for _, p := range s.target.Ports() {
		s.setANA(p.index, group, state)
	}
	return nil
}

func checkANA(group uint32, state nvme.ANAState) error {
	switch state {
	case nvme.ANAOptimized, nvme.ANANonOptimized, nvme.ANAInaccessible, nvme.ANAPersistentLoss, nvme.ANAChange:
	default:
		return fmt.Errorf("subsystem: unknown %v", state)
	}
	if group < 1 || group > MaxANAGroups {
		return fmt.Errorf("subsystem: ana group %d; want 1 to %d", group, MaxANAGroups)
	}
	return nil
}

func (s *Subsystem) setANA(port int, group uint32, state nvme.ANAState) {
	s.mu.Lock()
	changed := s.ana[port][group-1].Swap(uint32(state)) != uint32(state)
	if changed {
		s.anaChanges++
		s.anaCounts[port][group-1] = s.anaChanges
	}
	s.mu.Unlock()
	if !changed {
		return
	}
	for _, c := range s.target.controllers.of(s) {
		if c.port.index == port {
			c.notify(eventANA, 0)
		}
	}
}

// anaLog returns log page 0Ch for a port, without namespace ids if groupsOnly is set.
func (s *Subsystem) anaLog(p *Port, groupsOnly bool) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var members [MaxANAGroups][]uint32
	groups := 0
	for _, n := range *s.namespaces.Load() {
		if n == nil {
			continue
		}
		m := &members[n.group.Load()-1]
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
		log = nvme.AppendANAGroup(log, uint32(i)+1, s.anaCounts[p.index][i], nvme.ANAState(s.ana[p.index][i].Load()), ids...)
	}
	return log
}
