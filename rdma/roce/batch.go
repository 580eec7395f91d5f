package roce

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma/roce/wire"
)

// Limits of a batch
const (
	batchPackets = 64
	groupBytes   = 65000 // in one UDP_SEGMENT message; its most segments are batchPackets
)

// batch collects packets of one path for one sendmmsg. Consecutive packets of the same
// length, and a shorter one after them, form one UDP_SEGMENT message, because the cost
// depends on the number of messages.
type batch struct {
	path        *path
	bases       baseCache
	headersOnly bool // the ICRC does not cover the payload

	packets int
	pieces  int
	groups  int
	// The last group
	inGroup int
	segment int
	bytes   int

	headers  [batchPackets][wire.MaxHeaderLen]byte
	trailers [batchPackets][8]byte          // 0..3 bytes of padding and the ICRC
	iovs     [4 * batchPackets]unix.Iovec   // header, two pieces of payload, trailer
	msgs     [batchPackets]message          // one per group
	controls [batchPackets][controlLen]byte // one per group
	seg      [2]byte
}

func (b *batch) full() bool { return b.packets == batchPackets }

// header returns the buffer for the transport headers of the next packet.
func (b *batch) header() []byte { return b.headers[b.packets][:] }

// add adds a packet. Its headers are the first headLen bytes of the buffer that header
// returned; add sets their pad count. The payload has two pieces, which must not change
// before flush.
func (b *batch) add(headLen int, first, second []byte) {
	h := b.headers[b.packets][:headLen]
	n := len(first) + len(second)
	pad := -n & 3
	h[1] |= byte(pad << 4)
	length := headLen + n + pad + wire.ICRCLen

	if b.groups > 0 && b.path.sock.gso.Load() && length <= b.segment && b.bytes+length <= groupBytes &&
		b.inGroup*b.segment == b.bytes { // the last packet was not shorter
		b.inGroup++
	} else {
		b.closeGroup()
		b.groups++
		b.inGroup, b.segment, b.bytes = 1, length, 0
		m := &b.msgs[b.groups-1].hdr
		m.Iov = &b.iovs[b.pieces]
		m.SetIovlen(0)
	}
	b.bytes += length
	m := &b.msgs[b.groups-1].hdr

	crc := b.bases.get(b.path.local, b.path.remote, length)
	if b.path.sock.v4 {
		crc = wire.WithID(crc, uint8(b.inGroup-1))
	}
	crc = wire.Header(crc, h)
	b.piece(m, h)
	for _, p := range [2][]byte{first, second} {
		if len(p) > 0 {
			if !b.headersOnly {
				crc = wire.Update(crc, p)
			}
			b.piece(m, p)
		}
	}
	t := b.trailers[b.packets][:pad+wire.ICRCLen]
	clear(t[:pad])
	if !b.headersOnly {
		crc = wire.Update(crc, t[:pad])
	}
	wire.PutICRC(t[pad:], crc)
	b.piece(m, t)
	b.packets++
}

func (b *batch) piece(m *unix.Msghdr, p []byte) {
	v := &b.iovs[b.pieces]
	v.Base = &p[0]
	v.SetLen(len(p))
	m.Iovlen++
	b.pieces++
}

// closeGroup finishes the message of the last group.
func (b *batch) closeGroup() {
	if b.groups == 0 {
		return
	}
	m := &b.msgs[b.groups-1].hdr
	c := &b.controls[b.groups-1]
	n := b.path.controlLen
	*c = b.path.control
	if b.inGroup > 1 {
		binary.NativeEndian.PutUint16(b.seg[:], uint16(b.segment))
		n += putControl(c[n:], unix.IPPROTO_UDP, unix.UDP_SEGMENT, b.seg[:])
	}
	m.Control = &c[0]
	m.SetControllen(n)
	m.Name, m.Namelen = b.path.namePtr(), b.path.nameLen
}

// flush sends all packets.
func (b *batch) flush() error {
	if b.packets == 0 {
		return nil
	}
	b.closeGroup()
	err := b.path.sock.send(b.msgs[:b.groups])
	b.packets, b.pieces, b.groups = 0, 0, 0
	return err
}

// baseCache holds the results of wire.Base for the most recent lengths. A connection uses
// only a few lengths.
type baseCache struct {
	keys  [8]uint32 // length and source port
	bases [8]uint32
	next  uint8
}

func (c *baseCache) get(src, dst netip.AddrPort, length int) uint32 {
	key := uint32(length)<<16 | uint32(src.Port())
	for i, k := range c.keys {
		if k == key {
			return c.bases[i]
		}
	}
	base := wire.Base(src, dst, length)
	c.keys[c.next], c.bases[c.next] = key, base
	c.next = (c.next + 1) % uint8(len(c.keys))
	return base
}
