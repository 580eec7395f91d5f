package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The example packet of annex A17: BTH, payload, padding, ICRC, behind an IPv4
// header with identification 1144.
const (
	examplePacket = "2460ffff" + "000000d3" + "00cf1710" +
		"4630818be28935d90e9a95505401be885e50" + "0000" + "78f353f3"
	exampleID = 1144
)

func TestExampleICRC(t *testing.T) {
	b := unhex(t, examplePacket)
	a := netip.MustParseAddr("192.168.0.7")
	base := Base(netip.AddrPortFrom(a, 49152), netip.AddrPortFrom(a, Port), len(b))
	before := bytes.Clone(b)
	for _, guess := range []uint8{0, 1, 63} {
		if id, ok := Check(base, b, len(b)-ICRCLen, true, guess); !ok || id != exampleID {
			t.Errorf("guess %d: valid %v, identification %d, want %d", guess, ok, id, exampleID)
		}
	}
	if !bytes.Equal(b, before) {
		t.Error("the check changed the packet")
	}
}

// slowICRC computes the ICRC by its definition, bit by bit.
func slowICRC(pseudo []byte) uint32 {
	crc := ^uint32(0)
	for _, v := range pseudo {
		crc ^= uint32(v)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ crc32.IEEE
			} else {
				crc >>= 1
			}
		}
	}
	return ^crc
}

// random makes a packet with an ICRC that slowICRC computed.
func random(t testing.TB, rnd *rand.Rand, v4 bool, id uint16) (src, dst netip.AddrPort, packet []byte) {
	n := BTHLen + 4*rnd.IntN(1100)
	packet = make([]byte, n+ICRCLen)
	for i := range packet {
		packet[i] = byte(rnd.Uint32())
	}
	port := uint16(rnd.Uint32())
	var ip []byte
	if v4 {
		a, b := netip.AddrFrom4([4]byte{10, 1, 2, byte(rnd.Uint32())}), netip.AddrFrom4([4]byte{10, 9, 8, 7})
		src, dst = netip.AddrPortFrom(a, port), netip.AddrPortFrom(b, Port)
		ip = []byte{0x45, 0xff, 0, 0, byte(id >> 8), byte(id), 0x40, 0, 0xff, 17, 0xff, 0xff}
		binary.BigEndian.PutUint16(ip[2:], uint16(28+len(packet)))
	} else {
		a, b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fe80::1234:5678")
		src, dst = netip.AddrPortFrom(a, port), netip.AddrPortFrom(b, Port)
		ip = []byte{0x6f, 0xff, 0xff, 0xff, 0, 0, 17, 0xff}
		binary.BigEndian.PutUint16(ip[4:], uint16(8+len(packet)))
	}
	pseudo := append(bytes.Repeat([]byte{0xff}, 8), ip...)
	pseudo = append(pseudo, src.Addr().AsSlice()...)
	pseudo = append(pseudo, dst.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint16(pseudo, port)
	pseudo = binary.BigEndian.AppendUint16(pseudo, Port)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(8+len(packet)))
	pseudo = append(pseudo, 0xff, 0xff)
	bth := len(pseudo)
	pseudo = append(pseudo, packet[:n]...)
	pseudo[bth+4] = 0xff
	binary.LittleEndian.PutUint32(packet[n:], slowICRC(pseudo))
	return src, dst, packet
}

func TestICRC(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		id := uint16(rnd.Uint32())
		src, dst, b := random(t, rnd, true, id)
		base := Base(src, dst, len(b))
		if got, ok := Check(base, b, len(b)-ICRCLen, true, 3); !ok || got != id {
			t.Fatalf("IPv4, %d bytes: valid %v, identification %d, want %d", len(b), ok, got, id)
		}
		if id > MaxSmallID {
			continue
		}
		if got, ok := Check(base, b, len(b)-ICRCLen, true, uint8(id)); !ok || got != id {
			t.Fatalf("IPv4, guessed: valid %v, identification %d, want %d", ok, got, id)
		}
	}
	for id := range uint16(MaxSmallID + 1) { // every one that WithID knows
		src, dst, b := random(t, rnd, true, id)
		crc := Update(Header(WithID(Base(src, dst, len(b)), uint8(id)), b[:BTHLen]), b[BTHLen:len(b)-ICRCLen])
		if want := binary.LittleEndian.Uint32(b[len(b)-ICRCLen:]); crc != want {
			t.Fatalf("identification %d: %#x, want %#x", id, crc, want)
		}
	}
	for range 100 {
		src, dst, b := random(t, rnd, false, 0)
		if _, ok := Check(Base(src, dst, len(b)), b, len(b)-ICRCLen, false, 0); !ok {
			t.Fatalf("IPv6, %d bytes: not valid", len(b))
		}
	}
}

// A flipped bit is found, except in those cases that the 16 unknown bits hide.
func TestICRCFindsErrors(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, v4 := range []bool{true, false} {
		missed := 0
		for range 2000 {
			src, dst, b := random(t, rnd, v4, 0)
			base := Base(src, dst, len(b))
			bit := rnd.IntN(8 * len(b))
			if bit/8 == 4 {
				continue // not covered
			}
			b[bit/8] ^= 1 << (bit % 8)
			if _, ok := Check(base, b, len(b)-ICRCLen, v4, 0); ok {
				missed++
			}
		}
		if missed > 1 {
			t.Errorf("IPv4 %v: %d of 2000 errors were missed", v4, missed)
		}
	}
}

func TestHeaders(t *testing.T) {
	b := make([]byte, BTHLen+RETHLen)
	h := BTH{Op: WriteOnly, Pad: 3, AckReq: true, PKey: DefaultPKey, DestQP: 0x123456, PSN: 0xfedcba}
	h.Put(b)
	r := RETH{VA: 0x1122334455667788, RKey: 0x99aabbcc, Length: 0x00010203}
	r.Put(b[BTHLen:])
	want := "0a70ffff" + "00123456" + "80fedcba" + "1122334455667788" + "99aabbcc" + "00010203"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("WRITE_ONLY: %s, want %s", got, want)
	}
	packet := append(b, 1, 0, 0, 0, 9, 9, 9, 9)
	got, payload, ok := Parse(packet)
	if !ok || got != h || !bytes.Equal(payload, []byte{1}) || ParseRETH(packet[BTHLen:]) != r {
		t.Errorf("parsed %+v % x %v", got, payload, ok)
	}
	a := AETH{Syndrome: NAKRemoteAccess, MSN: 0x010203}
	a.Put(b)
	if hex.EncodeToString(b[:4]) != "62010203" || ParseAETH(b) != a {
		t.Errorf("AETH % x", b[:4])
	}
	for _, spoil := range []func([]byte) []byte{
		func(b []byte) []byte { return b[:len(b)-1] },
		func(b []byte) []byte { return b[:12] },
		func(b []byte) []byte { return nil },
		func(b []byte) []byte { b[0] = 0x12; return b }, // ATOMIC ACK
		func(b []byte) []byte { b[1] |= 1; return b },
		func(b []byte) []byte { b[2] = 0x12; return b },
		func(b []byte) []byte { return b[:32] }, // the pad reaches into the header
	} {
		if _, _, ok := Parse(spoil(bytes.Clone(packet))); ok {
			t.Error("a spoilt packet was parsed")
		}
	}
}

func TestPSNDiff(t *testing.T) {
	for _, c := range []struct {
		a, b uint32
		want int
	}{{0, 0, 0}, {1, 0, 1}, {0, 1, -1}, {0, 0xffffff, 1}, {0xffffff, 0, -1}, {0x7fffff, 0, 0x7fffff}, {0x800000, 0, -0x800000}} {
		if got := PSNDiff(c.a, c.b); got != c.want {
			t.Errorf("%#x - %#x = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestRequest(t *testing.T) {
	for _, addrs := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"fd00::1", "fd00::2"}} {
		want := Request{
			Port: 4420, GUID: 0x0102030405060708, QPN: 0xabcdef, PSN: 0x123456, ResponderResources: 16, InitiatorDepth: 4,
			AckTimeout: 17, RetryCount: 7, RNRRetryCount: 6, FlowControl: true, MTU: 1024, Proof: 0x55667788,
			Source: netip.MustParseAddr(addrs[0]), Destination: netip.MustParseAddr(addrs[1]), SourcePort: 50000,
			Private: [RequestPrivate]byte{1, 2, 3, RequestPrivate - 1: 9},
		}
		m := NewMAD(REQ, 0xaabbccddeeff0011, 0x11223344, 0)
		want.Put(m)
		if got, ok := ParseRequest(m); !ok || got != want {
			t.Errorf("parsed %+v, want %+v", got, want)
		}
		large := want
		large.MTU = HostMTU
		large.Put(m)
		if got, ok := ParseRequest(m); !ok || got != large {
			t.Errorf("parsed %+v, want %+v", got, large)
		}
		want.Put(m)
		// Offsets in the datagram, as the specification counts them.
		for _, c := range []struct {
			off  int
			want string
		}{
			{0, "01070203" + "00000000" + "aabbccddeeff0011" + "0010"},
			{24, "11223344"},
			{24 + 8, "0000000001061144" + "0102030405060708"},
			{24 + 28, "55667788"}, {24 + 32, "abcdef10"}, {24 + 36, "000000" + "04"},
			{24 + 43, "a1" + "123456" + "a7" + "ffff" + "36" + "f0" + "ffffffff"},
			{24 + 95, "88"},
		} {
			w := unhex(t, c.want)
			if got := m[c.off : c.off+len(w)]; !bytes.Equal(got, w) {
				t.Errorf("at %d: % x, want % x", c.off, got, w)
			}
		}
		if want.Source.Is4() {
			if got := hex.EncodeToString(m[24+140 : 24+140+36]); got != "0040c350"+"0000000000000000000000000a000001"+"0000000000000000000000000a000002" {
				t.Errorf("IP header %s", got)
			}
			if got := hex.EncodeToString(m[24+56 : 24+72]); got != "00000000000000000000ffff0a000001" {
				t.Errorf("GID %s", got)
			}
		}
		for _, off := range []int{24 + 9, 24 + 43, 24 + 50, 24 + 140, 24 + 141} {
			spoilt := *m
			spoilt[off] = 0xf6 // no MTU has the code 15
			if _, ok := ParseRequest(&spoilt); ok {
				t.Errorf("spoilt at %d, and yet parsed", off)
			}
		}
	}
}

func TestReplyReject(t *testing.T) {
	r := Reply{
		GUID: 0x0102030405060708, QPN: 0xabcdef, PSN: 0x654321, ResponderResources: 3, InitiatorDepth: 5,
		RNRRetryCount: 7, FlowControl: true, Private: [ReplyPrivate]byte{7, ReplyPrivate - 1: 8},
	}
	m := NewMAD(REP, 1, 2, 3)
	r.Put(m)
	if got := ParseReply(m); got != r {
		t.Errorf("parsed %+v, want %+v", got, r)
	}
	if got := hex.EncodeToString(m[24+12 : 24+36]); got != "abcdef00"+"00000000"+"65432100"+"030579e0"+"0102030405060708" {
		t.Errorf("REP %s", got)
	}
	j := Reject{Of: 1, Reason: 28, Private: [RejectPrivate]byte{4, RejectPrivate - 1: 5}}
	m = NewMAD(REJ, 1, 2, 3)
	j.Put(m)
	if got := ParseReject(m); got != j {
		t.Errorf("parsed %+v, want %+v", got, j)
	}
	m = NewMAD(DREQ, 1, 2, 3)
	m.SetQPN(0x778899)
	if m.QPN() != 0x778899 || m.Local() != 2 || m.Remote() != 3 || m.TID() != 1 || m.Attribute() != DREQ {
		t.Errorf("DREQ % x", m[:48])
	}
	b := m.Packet(9)
	h, payload, ok := Parse(b)
	if !ok || h.PSN != 9 || len(b) != 280 {
		t.Fatalf("packet of %d bytes: %+v", len(b), h)
	}
	if got, ok := ParseMAD(&h, b, payload); !ok || *got != *m {
		t.Error("the datagram did not come back")
	}
	b[BTHLen] ^= 1 // Q_Key
	if _, ok := ParseMAD(&h, b, payload); ok {
		t.Error("a wrong Q_Key was taken")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Add(NewMAD(REQ, 1, 2, 3).Packet(4))
	h := BTH{Op: ReadRequest, PKey: DefaultPKey}
	b := make([]byte, BTHLen+RETHLen+ICRCLen)
	h.Put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, ok := Parse(b)
		if !ok {
			return
		}
		if len(payload)+h.Op.HeaderLen()+int(h.Pad)+ICRCLen != len(b) {
			t.Fatal("lengths do not add up")
		}
		Check(0, b, len(b)-ICRCLen, true, 0)
		if m, ok := ParseMAD(&h, b, payload); ok {
			if r, ok := ParseRequest(m); ok {
				c := *m
				r.Put(&c)
				if again, ok := ParseRequest(&c); !ok || again != r {
					t.Fatalf("%+v became %+v", r, again)
				}
			}
			ParseReply(m)
			ParseReject(m)
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	rnd := rand.New(rand.NewPCG(5, 6))
	src, dst, p := random(b, rnd, true, 50000)
	base := Base(src, dst, len(p))
	b.Run("recovered", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			if _, ok := Check(base, p, len(p)-ICRCLen, true, 0); !ok {
				b.Fatal("not valid")
			}
		}
	})
	b.Run("unshift", func(b *testing.B) {
		for b.Loop() {
			takeZeros(0x12345678, 4100)
		}
	})
}

// TestRetryCounts checks that values that are too large for their fields become the
// largest value of the field.
func TestRetryCounts(t *testing.T) {
	for _, n := range []uint8{7, 8, 255} {
		m := NewMAD(REQ, 1, 2, 0)
		r := Request{RetryCount: n, RNRRetryCount: n, MTU: 1024, Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.MustParseAddr("192.0.2.2")}
		r.Put(m)
		if got, ok := ParseRequest(m); !ok || got.RetryCount != 7 || got.RNRRetryCount != 7 {
			t.Errorf("%d: %d and %d", n, got.RetryCount, got.RNRRetryCount)
		}
		a := Reply{RNRRetryCount: n}
		a.Put(m)
		if got := ParseReply(m).RNRRetryCount; got != 7 {
			t.Errorf("%d: %d", n, got)
		}
	}
}
