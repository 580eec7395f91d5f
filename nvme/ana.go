package nvme

import (
	"fmt"
	"iter"
)

// ANAState is the state of a group of namespaces as one controller sees them.
type ANAState uint8

// ANA states (Base, "Asymmetric Namespace Access States").
const (
	ANAOptimized      ANAState = 0x01
	ANANonOptimized   ANAState = 0x02
	ANAInaccessible   ANAState = 0x03
	ANAPersistentLoss ANAState = 0x04
	ANAChange         ANAState = 0x0F
)

// Usable reports whether I/O may be sent in this state.
func (s ANAState) Usable() bool { return s == ANAOptimized || s == ANANonOptimized }

// String returns the name of the state that sysfs and nvme-cli use.
func (s ANAState) String() string {
	switch s {
	case ANAOptimized:
		return "optimized"
	case ANANonOptimized:
		return "non-optimized"
	case ANAInaccessible:
		return "inaccessible"
	case ANAPersistentLoss:
		return "persistent-loss"
	case ANAChange:
		return "change"
	}
	return fmt.Sprintf("ana state %d", uint8(s))
}

// ANAHeaderSize is the size of the header of the ANA log in bytes.
const ANAHeaderSize = 16

const anaGroupSize = 32

// ANALogSize returns the largest size of the ANA log of a controller in bytes, given
// NANAGRPID and MNAN of [IdentifyController]. The log may be larger than a controller's
// largest transfer.
func ANALogSize(nanagrpid, mnan uint32) uint64 {
	return ANAHeaderSize + uint64(nanagrpid)*anaGroupSize + uint64(mnan)*4
}

// ANAGroupCount returns the number of groups that the header of an ANA log names, of which b
// may contain any part. It is 0 if b is shorter than the header.
func ANAGroupCount(b []byte) uint32 {
	if len(b) < ANAHeaderSize {
		return 0
	}
	return uint32(le.Uint16(b[8:10]))
}

// ANALog is a decoded ANA log (Base, "Asymmetric Namespace Access"). It refers to the
// bytes from which it was decoded. The zero value is a log without groups.
type ANALog struct {
	chgcnt uint64
	groups []byte // the group descriptors, checked
	n      int
}

// ANAGroup is a group of an [ANALog]. It refers to the bytes of the log.
type ANAGroup struct {
	// ID is not 0.
	ID uint32
	// ChangeCount counts the changes of this group.
	ChangeCount uint64
	// State is 1..15.
	State ANAState

	nsids []byte
}

// ParseANALog checks and decodes a whole log. It ignores bytes after the last group. It
// returns an error if a group does not fit, if a group id is 0, or if a state is outside
// 1..15.
func ParseANALog(b []byte) (ANALog, error) {
	if len(b) < ANAHeaderSize {
		return ANALog{}, fmt.Errorf("decode ana log: %d bytes, want %d", len(b), ANAHeaderSize)
	}
	l := ANALog{chgcnt: le.Uint64(b[0:8]), n: int(ANAGroupCount(b))}
	rest := b[ANAHeaderSize:]
	l.groups = rest
	for i := range l.n {
		if len(rest) < anaGroupSize {
			return ANALog{}, fmt.Errorf("decode ana log: group %d of %d is cut off", i+1, l.n)
		}
		n := uint64(le.Uint32(rest[4:8]))
		if uint64(len(rest)-anaGroupSize) < n*4 {
			return ANALog{}, fmt.Errorf("decode ana log: group %d of %d is cut off: %d namespaces", i+1, l.n, n)
		}
		var g ANAGroup
		g, rest = nextANAGroup(rest)
		if g.ID == 0 {
			return ANALog{}, fmt.Errorf("decode ana log: group %d of %d has id 0", i+1, l.n)
		}
		if g.State == 0 || g.State > ANAChange {
			return ANALog{}, fmt.Errorf("decode ana log: group id %d: state %d", g.ID, uint8(g.State))
		}
	}
	l.groups = l.groups[:len(l.groups)-len(rest)]
	return l, nil
}

// nextANAGroup decodes the first group of b, which must contain the whole group.
func nextANAGroup(b []byte) (ANAGroup, []byte) {
	end := anaGroupSize + 4*int(le.Uint32(b[4:8]))
	return ANAGroup{
		ID:          le.Uint32(b[0:4]),
		ChangeCount: le.Uint64(b[8:16]),
		State:       ANAState(b[16]),
		nsids:       b[anaGroupSize:end],
	}, b[end:]
}

// ChangeCount returns the number of changes of the log.
func (l ANALog) ChangeCount() uint64 { return l.chgcnt }

// NumGroups returns the number of groups.
func (l ANALog) NumGroups() int { return l.n }

// Groups yields the groups in the order of the log.
func (l ANALog) Groups() iter.Seq[ANAGroup] {
	return func(yield func(ANAGroup) bool) {
		for rest := l.groups; len(rest) > 0; {
			var g ANAGroup
			if g, rest = nextANAGroup(rest); !yield(g) {
				return
			}
		}
	}
}

// NumNSIDs returns the number of namespaces in the group.
func (g ANAGroup) NumNSIDs() int { return len(g.nsids) / 4 }

// NSIDs yields the namespaces in the group.
func (g ANAGroup) NSIDs() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for b := g.nsids; len(b) > 0; b = b[4:] {
			if !yield(le.Uint32(b)) {
				return
			}
		}
	}
}

// AppendANAHeader appends the header of an ANA log with this number of groups.
func AppendANAHeader(b []byte, changeCount uint64, groups uint16) []byte {
	var raw [ANAHeaderSize]byte
	le.PutUint64(raw[0:8], changeCount)
	le.PutUint16(raw[8:10], groups)
	return append(b, raw[:]...)
}

// AppendANAGroup appends a group.
func AppendANAGroup(b []byte, id uint32, changeCount uint64, state ANAState, nsids ...uint32) []byte {
	var raw [anaGroupSize]byte
	le.PutUint32(raw[0:4], id)
	le.PutUint32(raw[4:8], uint32(len(nsids)))
	le.PutUint64(raw[8:16], changeCount)
	raw[16] = byte(state)
	b = append(b, raw[:]...)
	for _, id := range nsids {
		b = le.AppendUint32(b, id)
	}
	return b
}
