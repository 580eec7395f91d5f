package nvme

import "fmt"

// SGLSize is the size of an SGL descriptor in bytes.
const SGLSize = 16

// MaxKeyedLength is the largest length of a keyed descriptor, in bytes. Its length field
// has 24 bits.
const MaxKeyedLength = 1<<24 - 1

// SGLType is the last byte of a descriptor: type in the high nibble, subtype
// in the low one.
type SGLType uint8

// Descriptor types used on RDMA.
const (
	// SGLInCapsule is a data block at an offset within the capsule.
	SGLInCapsule SGLType = 0x01
	// SGLLastSegment is a list of descriptors at an offset within the capsule: the last
	// segment, and on RDMA the only one, of the SGL that begins in the command.
	SGLLastSegment SGLType = 0x31
	// SGLKeyed is remote memory named by address, length and key.
	SGLKeyed SGLType = 0x40
	// SGLKeyedInvalidate is like SGLKeyed, but the controller must invalidate the key
	// with the response, by RDMA SEND WITH INVALIDATE.
	SGLKeyedInvalidate SGLType = 0x4F
)

// String returns the name of the type.
func (t SGLType) String() string {
	switch t {
	case SGLInCapsule:
		return "in capsule"
	case SGLLastSegment:
		return "list in capsule"
	case SGLKeyed:
		return "keyed"
	case SGLKeyedInvalidate:
		return "keyed, invalidate"
	}
	return fmt.Sprintf("sgl type %02xh", uint8(t))
}

// SGL is one descriptor (Base, "Scatter Gather List").
//
//	keyed:      0 address   8 length (24 bits)   11 key   15 type
//	in capsule: 0 offset    8 length (32 bits)   12 zero  15 type
//	list:       as in capsule; the length is that of the descriptors
type SGL [SGLSize]byte

// KeyedSGL returns a descriptor of length bytes of remote memory. It panics if
// length exceeds MaxKeyedLength.
func KeyedSGL(addr uint64, length, key uint32, invalidate bool) SGL {
	var s SGL
	le.PutUint64(s[0:8], addr)
	le.PutUint64(s[8:16], keyedWord(length, key, invalidate))
	return s
}

// InCapsuleSGL returns a descriptor of length bytes in the capsule, offset
// bytes after the start of its data area.
func InCapsuleSGL(offset uint64, length uint32) SGL {
	var s SGL
	le.PutUint64(s[0:8], offset)
	le.PutUint64(s[8:16], inCapsuleWord(length))
	return s
}

// LastSegmentSGL returns a descriptor of a list of n descriptors in the capsule, offset bytes
// after the start of its data area.
func LastSegmentSGL(offset uint64, n int) SGL {
	var s SGL
	le.PutUint64(s[0:8], offset)
	le.PutUint64(s[8:16], lastSegmentWord(n))
	return s
}

// NoDataSGL returns the descriptor of a command without data: a keyed descriptor of
// length 0. RDMA controllers refuse any other.
func NoDataSGL() SGL { return KeyedSGL(0, 0, 0, false) }

func keyedWord(length, key uint32, invalidate bool) uint64 {
	if length > MaxKeyedLength {
		panic("nvme: keyed sgl longer than 24 bits")
	}
	w := uint64(length) | uint64(key)<<24 | uint64(SGLKeyed)<<56
	if invalidate {
		w |= uint64(SGLKeyedInvalidate) << 56
	}
	return w
}

func inCapsuleWord(length uint32) uint64 {
	return uint64(length) | uint64(SGLInCapsule)<<56
}

func lastSegmentWord(n int) uint64 {
	if uint64(n) >= 1<<28 {
		panic("nvme: a list of descriptors of 4 GiB or more")
	}
	return uint64(n)*SGLSize | uint64(SGLLastSegment)<<56
}

// SGLAt returns the first 16 bytes of b as a descriptor, without a copy. It panics if b is
// shorter.
func SGLAt(b []byte) *SGL { return (*SGL)(b[:SGLSize:SGLSize]) }

// SetKeyed makes the descriptor that of length bytes of remote memory. It panics if length exceeds
// MaxKeyedLength.
func (s *SGL) SetKeyed(addr uint64, length, key uint32) {
	le.PutUint64(s[0:8], addr)
	le.PutUint64(s[8:16], keyedWord(length, key, false))
}

// Type returns the type and subtype.
func (s SGL) Type() SGLType { return SGLType(s[15]) }

// Keyed decodes a keyed descriptor. ok is false for any other type. The length is 0 for a
// command without data.
func (s SGL) Keyed() (addr uint64, length, key uint32, invalidate, ok bool) {
	return decodeKeyed(le.Uint64(s[0:8]), le.Uint64(s[8:16]))
}

// InCapsule decodes a descriptor of in-capsule data. ok is false for any other
// type.
func (s SGL) InCapsule() (offset uint64, length uint32, ok bool) {
	return le.Uint64(s[0:8]), le.Uint32(s[8:12]), s.Type() == SGLInCapsule
}

// LastSegment decodes a descriptor of a list in the capsule. length is that of the list in bytes,
// of any value. ok is false for any other type.
func (s SGL) LastSegment() (offset uint64, length uint32, ok bool) {
	return le.Uint64(s[0:8]), le.Uint32(s[8:12]), s.Type() == SGLLastSegment
}

// String returns a description of the descriptor. It does not contain the key, because
// the key is a capability.
func (s SGL) String() string {
	if addr, length, _, _, ok := s.Keyed(); ok {
		if addr == 0 && length == 0 {
			return "no data"
		}
		return fmt.Sprintf("%v %#x+%d", s.Type(), addr, length)
	}
	if offset, length, ok := s.InCapsule(); ok {
		return fmt.Sprintf("%v %d+%d", s.Type(), offset, length)
	}
	if offset, length, ok := s.LastSegment(); ok {
		return fmt.Sprintf("%v %d+%d", s.Type(), offset, length)
	}
	return s.Type().String()
}

func decodeKeyed(lo, hi uint64) (addr uint64, length, key uint32, invalidate, ok bool) {
	t := SGLType(hi >> 56)
	return lo, uint32(hi & MaxKeyedLength), uint32(hi >> 24), t == SGLKeyedInvalidate, t == SGLKeyed || t == SGLKeyedInvalidate
}

// SGL returns the data descriptor of the command, bytes 24 to 39.
func (c *Command) SGL() SGL { return SGL(c[24:40]) }

// SetSGL sets the data descriptor.
func (c *Command) SetSGL(s SGL) { *(*SGL)(c[24:40]) = s }

// SetKeyedSGL makes length bytes of memory at addr the command's data. With invalidate,
// the controller must invalidate the key in its response. This is allowed only for a key
// that can be invalidated remotely: that of a fast registration or of a memory window. It
// panics if length exceeds MaxKeyedLength.
func (c *Command) SetKeyedSGL(addr uint64, length uint32, key uint32, invalidate bool) {
	le.PutUint64(c[24:32], addr)
	le.PutUint64(c[32:40], keyedWord(length, key, invalidate))
}

// SetInCapsuleSGL makes length bytes that follow the command in its capsule the command's
// data. offset is relative to the controller's ICDOFF.
func (c *Command) SetInCapsuleSGL(offset uint64, length uint32) {
	le.PutUint64(c[24:32], offset)
	le.PutUint64(c[32:40], inCapsuleWord(length))
}

// SetLastSegmentSGL makes a list of n descriptors that follow the command in its capsule the
// command's data. offset is relative to the controller's ICDOFF. The list may have as many keyed
// descriptors as MSDBD and IOCCSZ of the controller allow.
func (c *Command) SetLastSegmentSGL(offset uint64, n int) {
	le.PutUint64(c[24:32], offset)
	le.PutUint64(c[32:40], lastSegmentWord(n))
}

// SetNoData sets the data descriptor of a command without data.
func (c *Command) SetNoData() {
	le.PutUint64(c[24:32], 0)
	le.PutUint64(c[32:40], uint64(SGLKeyed)<<56)
}

// KeyedSGL decodes the command's data descriptor in the same way as [SGL.Keyed].
func (c *Command) KeyedSGL() (addr uint64, length, key uint32, invalidate, ok bool) {
	return decodeKeyed(le.Uint64(c[24:32]), le.Uint64(c[32:40]))
}

// InCapsuleSGL decodes the command's data descriptor in the same way as [SGL.InCapsule].
func (c *Command) InCapsuleSGL() (offset uint64, length uint32, ok bool) {
	return le.Uint64(c[24:32]), le.Uint32(c[32:36]), SGLType(c[39]) == SGLInCapsule
}

// LastSegmentSGL decodes the command's data descriptor in the same way as [SGL.LastSegment].
func (c *Command) LastSegmentSGL() (offset uint64, length uint32, ok bool) {
	return le.Uint64(c[24:32]), le.Uint32(c[32:36]), SGLType(c[39]) == SGLLastSegment
}
