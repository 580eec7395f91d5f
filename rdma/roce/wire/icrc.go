package wire

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"net/netip"
	"sync"
)

// The invariant CRC (IBTA 7.8.1, A17.3.3) is a CRC-32 over eight bytes of ones, the IP
// and UDP headers and the packet. Ones replace the fields that routers may change. The
// CRC covers the identification field of IPv4, which an ordinary UDP socket does not show
// to the receiver. A CRC is linear, so the difference that the unknown field makes can be
// computed backwards from the packet's CRC. The packet is valid if and only if the result
// fits in the 16 bits of the field.
//
// For IPv4, "don't fragment" is assumed to be set and options are assumed to be absent.

// onesState is the result of crc32.Update after eight bytes of ones.
var onesState = crc32.Update(0, crc32.IEEETable, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})

// maskedFECN replaces the fifth byte of a BTH.
const maskedFECN = 0xff

// Base returns the CRC of the masked IP and UDP headers of a packet with the given length
// of UDP payload in bytes, including the ICRC. The identification field is 0. Both
// addresses must be of the same family, and must not be IPv4 in IPv6.
func Base(src, dst netip.AddrPort, length int) uint32 {
	var b [48]byte
	udp := b[20:28]
	if src.Addr().Is4() {
		b[0], b[1] = 0x45, 0xff
		binary.BigEndian.PutUint16(b[2:], uint16(28+length))
		b[6], b[8], b[9], b[10], b[11] = 0x40, 0xff, 17, 0xff, 0xff
		s, d := src.Addr().As4(), dst.Addr().As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
	} else {
		udp = b[40:48]
		b[0], b[1], b[2], b[3] = 0x6f, 0xff, 0xff, 0xff
		binary.BigEndian.PutUint16(b[4:], uint16(8+length))
		b[6], b[7] = 17, 0xff
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(b[8:], s[:])
		copy(b[24:], d[:])
	}
	binary.BigEndian.PutUint16(udp, src.Port())
	binary.BigEndian.PutUint16(udp[2:], dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+length))
	udp[6], udp[7] = 0xff, 0xff
	end := 28
	if !src.Addr().Is4() {
		end = 48
	}
	// crc32.Update would make b escape to the heap.
	s := ^onesState
	for _, v := range b[:end] {
		s = crc32.IEEETable[uint8(s)^v] ^ s>>8
	}
	return ^s
}

// MaxSmallID is the largest IPv4 identification that WithID supports.
const MaxSmallID = 255

// afterID is the number of bytes of the IPv4 and UDP headers after the identification
// field.
const afterID = 22

// smallIDs holds the differences that identifications make to Base.
var smallIDs = func() (t [MaxSmallID + 1]uint32) {
	for id := range t {
		t[id] = feedZeros(uint32(bits.ReverseBytes16(uint16(id))), afterID+2)
	}
	return t
}()

// WithID returns the Base of IPv4 with another identification field.
func WithID(base uint32, id uint8) uint32 { return base ^ smallIDs[id] }

// Header continues a Base over the transport headers.
func Header(base uint32, h []byte) uint32 {
	fecn := h[4]
	h[4] = maskedFECN
	base = crc32.Update(base, crc32.IEEETable, h)
	h[4] = fecn
	return base
}

// Update continues a CRC over payload and padding.
func Update(crc uint32, b []byte) uint32 { return crc32.Update(crc, crc32.IEEETable, b) }

// PutICRC writes a finished CRC to b.
func PutICRC(b []byte, crc uint32) { binary.LittleEndian.PutUint32(b, crc) }

// Check verifies the CRC at the end of a packet. The CRC covers the first end bytes of
// the packet, usually all bytes before the CRC, and at least BTHLen. For IPv4, Check
// returns the identification field that the packet must have had. guess is its likely
// value.
func Check(base uint32, packet []byte, end int, v4 bool, guess uint8) (id uint16, ok bool) {
	start := base
	if v4 {
		start = WithID(base, guess)
	}
	got := Update(Header(start, packet[:BTHLen]), packet[BTHLen:end])
	delta := got ^ binary.LittleEndian.Uint32(packet[len(packet)-ICRCLen:])
	if delta == 0 {
		return uint16(guess), true
	}
	if !v4 {
		return 0, false
	}
	back := takeZeros(delta, afterID+2+end)
	if back > 0xffff {
		return 0, false
	}
	return bits.ReverseBytes16(uint16(back)) ^ uint16(guess), true
}

// feedZeros returns the linear part of a CRC over n bytes of zeros.
func feedZeros(s uint32, n int) uint32 {
	for range n {
		s = crc32.IEEETable[s&0xff] ^ s>>8
	}
	return s
}

// takeZeros reverses feedZeros, for 0 ≤ n < 1<<16.
func takeZeros(s uint32, n int) uint32 {
	maps := takes()
	for i := 0; n != 0; i, n = i+1, n>>1 {
		if n&1 != 0 {
			s = maps[i].apply(s)
		}
	}
	return s
}

// linear is a linear map of 32-bit vectors over GF(2), tabulated by the bytes of its
// argument.
type linear [4][256]uint32

func (l *linear) apply(s uint32) uint32 {
	return l[0][s&0xff] ^ l[1][s>>8&0xff] ^ l[2][s>>16&0xff] ^ l[3][s>>24]
}

func makeLinear(f func(uint32) uint32) *linear {
	var l linear
	for i := range l {
		for v := 1; v < 256; v++ {
			if low := v & -v; low != v {
				l[i][v] = l[i][low] ^ l[i][v^low]
			} else {
				l[i][v] = f(uint32(v) << (8 * i))
			}
		}
	}
	return &l
}

// takes returns the maps that remove 1<<i zero bytes. They are made when the first packet has another
// identification than was guessed, because they would make each start of a program longer.
var takes = sync.OnceValue(func() *[16]*linear {
	var byTop [256]uint32
	for i, v := range crc32.IEEETable {
		byTop[v>>24] = uint32(i)
	}
	var t [16]*linear
	t[0] = makeLinear(func(s uint32) uint32 {
		i := byTop[s>>24]
		return (s^crc32.IEEETable[i])<<8 | i
	})
	for i := range t[1:] {
		t[i+1] = makeLinear(func(s uint32) uint32 { return t[i].apply(t[i].apply(s)) })
	}
	return &t
})
