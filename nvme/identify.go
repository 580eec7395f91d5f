package nvme

import (
	"errors"
	"fmt"
	"iter"
)

// IdentifySize is the size of every Identify structure in bytes.
const IdentifySize = 4096

// Structures that an Identify can request (CNS)
const (
	CNSNamespace            = 0x00 // IdentifyNamespace
	CNSController           = 0x01 // IdentifyController
	CNSActiveNSList         = 0x02 // ActiveNSList, ids above NSID
	CNSNamespaceDescriptors = 0x03 // NamespaceIDs
	CNSNamespaceCSI         = 0x05 // IdentifyNamespaceNVM for CSINVM
	CNSControllerCSI        = 0x06 // IdentifyControllerNVM for CSINVM
	CNSActiveNSListCSI      = 0x07 // ActiveNSList of one command set
	CNSNSIndependent        = 0x08 // IdentifyNSIndependent
	CNSCommandSets          = 0x1C
)

// I/O command set identifiers (CSI)
const (
	CSINVM      = 0
	CSIKeyValue = 1
	CSIZoned    = 2
)

// NSListEntries is the number of namespace ids in one list.
const NSListEntries = IdentifySize / 4

// ActiveNSList is Identify CNS 02h: namespace ids in ascending order. A 0 or the end of
// the structure ends the list. If the list is full, the host must send another Identify
// with the last id.
type ActiveNSList [IdentifySize]byte

// ActiveNSListAt returns the first 4096 bytes of b, without a copy. It panics if b is
// shorter.
func ActiveNSListAt(b []byte) *ActiveNSList {
	return (*ActiveNSList)(b[:IdentifySize:IdentifySize])
}

// ErrNSListOrder is the error for a list whose ids are not in ascending order.
var ErrNSListOrder = errors.New("decode namespace list: ids do not rise")

// NSIDs returns the ids. The error is ErrNSListOrder if they are not in ascending order,
// because reading list after list would then never end.
func (l *ActiveNSList) NSIDs() ([]uint32, error) {
	var ids []uint32
	last := uint32(0)
	for id := range nsids(l[:]) {
		if id <= last {
			return nil, ErrNSListOrder
		}
		ids = append(ids, id)
		last = id
	}
	return ids, nil
}

// Set fills the list with ids, which must be in ascending order, and returns the number
// of ids that fit.
func (l *ActiveNSList) Set(ids []uint32) int {
	clear(l[:])
	n := min(len(ids), NSListEntries)
	for i, id := range ids[:n] {
		le.PutUint32(l[4*i:4*i+4], id)
	}
	return n
}

// nsids yields the ids before the first 0.
func nsids(b []byte) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for ; len(b) >= 4; b = b[4:] {
			id := le.Uint32(b)
			if id == 0 || !yield(id) {
				return
			}
		}
	}
}

// Types and lengths of namespace descriptors
const (
	nidtEUI64 = 1
	nidtNGUID = 2
	nidtUUID  = 3
	nidtCSI   = 4

	nidHeader = 4
)

// NamespaceIDs identifies a namespace. It is the content of the descriptor list of
// Identify CNS 03h. A zero identifier is absent.
type NamespaceIDs struct {
	EUI64 [8]byte
	NGUID [16]byte
	UUID  UUID
	// CSI is the I/O command set. It is CSINVM if the list does not name one.
	CSI uint8
	// HasCSI reports whether the list names a command set.
	HasCSI bool
}

// ParseNamespaceDescriptors decodes a list of namespace descriptors. A descriptor has a
// type, a length, two reserved bytes and the identifier. A length of 0 or the end of b
// ends the list. Unknown types are skipped. It returns an error if a known type has the
// wrong length, or if a descriptor exceeds the list.
func ParseNamespaceDescriptors(b []byte) (NamespaceIDs, error) {
	var ids NamespaceIDs
	for len(b) >= nidHeader {
		t, n := b[0], int(b[1])
		if n == 0 {
			return ids, nil
		}
		if len(b) < nidHeader+n {
			return NamespaceIDs{}, fmt.Errorf("decode namespace descriptor: type %d of %d bytes exceeds the list", t, n)
		}
		nid := b[nidHeader : nidHeader+n]
		b = b[nidHeader+n:]
		want := n
		switch t {
		case nidtEUI64:
			if want = len(ids.EUI64); n == want {
				copy(ids.EUI64[:], nid)
			}
		case nidtNGUID:
			if want = len(ids.NGUID); n == want {
				copy(ids.NGUID[:], nid)
			}
		case nidtUUID:
			if want = len(ids.UUID); n == want {
				copy(ids.UUID[:], nid)
			}
		case nidtCSI:
			if want = 1; n == want {
				ids.CSI, ids.HasCSI = nid[0], true
			}
		}
		if n != want {
			return NamespaceIDs{}, fmt.Errorf("decode namespace descriptor: type %d has %d bytes, want %d", t, n, want)
		}
	}
	return ids, nil
}

// AppendTo appends a descriptor for each identifier that is present. The list ends at the
// first zero after it, so clear an Identify buffer first.
func (ids NamespaceIDs) AppendTo(b []byte) []byte {
	add := func(t byte, nid []byte) {
		b = append(b, t, byte(len(nid)), 0, 0)
		b = append(b, nid...)
	}
	if ids.EUI64 != ([8]byte{}) {
		add(nidtEUI64, ids.EUI64[:])
	}
	if ids.NGUID != ([16]byte{}) {
		add(nidtNGUID, ids.NGUID[:])
	}
	if !ids.UUID.IsZero() {
		add(nidtUUID, ids.UUID[:])
	}
	if ids.HasCSI {
		add(nidtCSI, []byte{ids.CSI})
	}
	return b
}
