package nvme

import "fmt"

// ExtendedEntryMin is the size in bytes of an extended discovery entry without
// attributes, and MaxExtendedEntry the largest size that is accepted.
const (
	ExtendedEntryMin = DiscoveryEntrySize + 8
	MaxExtendedEntry = 64 << 10
)

// AttributeHostID is the type of an [ExtendedAttribute] with a host identifier.
// Implementations disagree about the other types.
const AttributeHostID = 1

// ExtendedAttribute is an attribute of an extended discovery entry (Base, "Extended
// Discovery Log Page Entry").
type ExtendedAttribute struct {
	Type  uint16
	Value []byte // at most 64 KiB
}

// AppendExtendedEntry appends a discovery entry with attributes. The error is that of
// values that do not fit into MaxExtendedEntry.
func AppendExtendedEntry(b []byte, e *DiscoveryEntry, attributes []ExtendedAttribute) ([]byte, error) {
	size := ExtendedEntryMin
	for _, a := range attributes {
		if size += 4 + padded(len(a.Value)); size > MaxExtendedEntry {
			return b, fmt.Errorf("encode extended discovery entry: more than %d bytes", MaxExtendedEntry)
		}
	}
	b = append(b, e[:]...)
	b = le.AppendUint32(b, uint32(size))
	b = le.AppendUint16(b, uint16(len(attributes)))
	b = append(b, 0, 0)
	for _, a := range attributes {
		b = le.AppendUint16(b, a.Type)
		b = le.AppendUint16(b, uint16(len(a.Value)))
		b = append(b, a.Value...)
		b = append(b, make([]byte, padded(len(a.Value))-len(a.Value))...)
	}
	return b, nil
}

// padded rounds a length up to whole dwords.
func padded(n int) int { return (n + 3) &^ 3 }

// ParseExtendedEntry decodes the extended discovery entry that b begins with. Attributes
// are copies. size is its length in b.
func ParseExtendedEntry(b []byte) (e DiscoveryEntry, attributes []ExtendedAttribute, size int, err error) {
	fail := func(format string, args ...any) (DiscoveryEntry, []ExtendedAttribute, int, error) {
		return DiscoveryEntry{}, nil, 0, fmt.Errorf("decode extended discovery entry: "+format, args...)
	}
	if len(b) < ExtendedEntryMin {
		return fail("%d bytes, want %d", len(b), ExtendedEntryMin)
	}
	length, number := le.Uint32(b[1024:1028]), int(le.Uint16(b[1028:1030]))
	switch {
	case length < ExtendedEntryMin || length > MaxExtendedEntry || length%4 != 0:
		return fail("length %d, want a multiple of 4 from %d to %d", length, ExtendedEntryMin, MaxExtendedEntry)
	case int(length) > len(b):
		return fail("%d of %d bytes", len(b), length)
	}
	rest := b[ExtendedEntryMin:length]
	for i := range number {
		if len(rest) < 4 {
			return fail("attribute %d of %d is beyond the entry", i+1, number)
		}
		kind, n := le.Uint16(rest[0:2]), int(le.Uint16(rest[2:4]))
		if padded(n) > len(rest)-4 {
			return fail("attribute %d of %d has %d bytes and the entry %d", i+1, number, n, len(rest)-4)
		}
		attributes = append(attributes, ExtendedAttribute{Type: kind, Value: append([]byte(nil), rest[4:4+n]...)})
		rest = rest[4+padded(n):]
	}
	return *DiscoveryEntryAt(b), attributes, int(length), nil
}

// LogSupported is log page 00h: the log pages that a controller has, LogSupportedSize bytes.
const (
	LogSupported     = 0x00
	LogSupportedSize = 1024
)

// LogSupport is the entry of a log page in log page 00h.
type LogSupport uint32

// NewLogSupport makes the entry of a log page that the controller has.
func NewLogSupport(specific uint16) LogSupport { return LogSupport(specific)<<16 | 1 }

// PutLogSupport writes the entry of a log page into log page 00h.
func PutLogSupport(log []byte, lid uint8, s LogSupport) {
	le.PutUint32(log[4*int(lid):], uint32(s))
}

// Supported reports whether the controller has the log page.
func (s LogSupport) Supported() bool { return s&1 != 0 }

// Specific returns the part of the entry that depends on the log page; for the
// discovery log the Discovery bits that may be asked for.
func (s LogSupport) Specific() uint16 { return uint16(s >> 16) }
