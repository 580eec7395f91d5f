package rdmatest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/rdma"
)

func testSend(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	for i, n := range []int{0, 1, 16, 64, 4095, 4096, 4097, 100_000} {
		for _, d := range [][2]*side{{a, p}, {p, a}} {
			from, to := d[0], d[1]
			pattern(from.mr.Bytes()[:n], n)
			clear(to.mr.Bytes()[200_000 : 200_000+n+1])
			to.postRecv(uint64(i), 200_000, n+1)
			wr := from.sendWR(uint64(100+i), 0, n)
			if n == 0 {
				wr.NumSGE = 0
			}
			from.postSend(wr)
			wc := to.waitOK(to.recvCQ, uint64(i))
			if !wc.Recv || wc.Bytes != uint32(n) || wc.Flags != 0 {
				t.Errorf("receive of %d bytes: %+v", n, wc)
			}
			if wc := from.waitOK(from.sendCQ, uint64(100+i)); wc.Recv {
				t.Errorf("send of %d bytes completed as a receive", n)
			}
			wantPattern(t, to.mr.Bytes()[200_000:200_000+n], n)
			if to.mr.Bytes()[200_000+n] != 0 {
				t.Errorf("send of %d bytes wrote more", n)
			}
		}
	}
}

func testSendBeforeReceive(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	pattern(a.mr.Bytes()[:64], 1)
	a.postSend(a.sendWR(1, 0, 64))
	a.none(a.sendCQ)
	p.postRecv(2, 0, 64)
	p.waitOK(p.recvCQ, 2)
	a.waitOK(a.sendCQ, 1)
	wantPattern(t, p.mr.Bytes()[:64], 1)
}

func testSendTooLong(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	p.postRecv(1, 0, 64)
	a.postSend(a.sendWR(2, 0, 65))
	if wc := a.wait(a.sendCQ, 1)[0]; wc.Status == rdma.WCSuccess || wc.Status == rdma.WCFlushErr {
		t.Errorf("send into a shorter receive: %s", wc.Status)
	}
	if wc := p.wait(p.recvCQ, 1)[0]; wc.Status == rdma.WCSuccess {
		t.Error("a receive took more than its length")
	}
}

func testBatch(t *testing.T, s Setup) {
	const n = 150 // more than the providers take at a time
	a, p := connection(t, s, config{depth: n, memory: n * 4096})
	recvs, sends := make([]rdma.RecvWR, n), make([]rdma.SendWR, n)
	signaled := []uint64{}
	for i := range n {
		pattern(a.mr.Bytes()[i*4096:i*4096+i+1], i)
		recvs[i] = rdma.RecvWR{ID: uint64(i), SGE: p.sge(i*4096, 4096)}
		sends[i] = a.sendWR(uint64(1000+i), i*4096, i+1)
		sends[i].Signaled = i%7 == 3 || i == n-1
		if sends[i].Signaled {
			signaled = append(signaled, sends[i].ID)
		}
	}
	if k, err := p.qp.PostRecv(recvs); err != nil || k != n {
		t.Fatalf("posted %d receives: %v", k, err)
	}
	a.postSend(sends...)
	clear(sends) // they are ours again
	clear(recvs)
	for i, wc := range p.wait(p.recvCQ, n) {
		if wc.ID != uint64(i) || wc.Status != rdma.WCSuccess || wc.Bytes != uint32(i+1) {
			t.Fatalf("receive %d: %+v", i, wc)
		}
		wantPattern(t, p.mr.Bytes()[i*4096:i*4096+i+1], i)
	}
	for i, wc := range a.wait(a.sendCQ, len(signaled)) {
		if wc.ID != signaled[i] || wc.Status != rdma.WCSuccess {
			t.Fatalf("send completion %d: %+v, want ID %d", i, wc, signaled[i])
		}
	}
	a.none(a.sendCQ)
	if k, err := a.qp.PostSend(nil); k != 0 || err != nil {
		t.Errorf("posted %d of nothing: %v", k, err)
	}
	if k, err := a.sendCQ.Poll(nil); k != 0 || err != nil {
		t.Errorf("polled %d of nothing: %v", k, err)
	}
}

func testQueueFull(t *testing.T, s Setup) {
	const depth = 16
	a, p := connection(t, s, config{depth: depth, cqe: 1024})
	for name, post := range map[string]func() (int, error){
		"send": func() (int, error) { return a.qp.PostSend([]rdma.SendWR{a.sendWR(1, 0, 8), a.sendWR(1, 0, 8)}) },
		"recv": func() (int, error) {
			return a.qp.PostRecv([]rdma.RecvWR{{ID: 1, SGE: a.sge(0, 8)}, {ID: 1, SGE: a.sge(0, 8)}})
		},
	} {
		taken := 0
		for {
			n, err := post()
			taken += n
			if err != nil {
				if n == 2 {
					t.Errorf("%s: all taken, and yet %v", name, err)
				}
				break
			}
			if taken > 512 {
				t.Fatalf("%s: a queue of %d took %d work requests", name, depth, taken)
			}
		}
		if taken < depth {
			t.Errorf("%s: a queue of %d took only %d work requests", name, depth, taken)
		}
		check(t, a.qp.Fail())
		cq := a.sendCQ
		if name == "recv" {
			cq = a.recvCQ
		}
		for _, wc := range a.wait(cq, taken) {
			if wc.ID != 1 || wc.Status != rdma.WCFlushErr {
				t.Errorf("%s: %+v, want flushed", name, wc)
			}
		}
		a.none(cq)
		check(t, errors.Join(a.close(), p.close()))
		a, p = connection(t, s, config{depth: depth, cqe: 1024})
	}
}

func testTwoElements(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	mem, peer := a.mr.Bytes(), p.mr.Bytes()
	gathered := func(off1, n1, off2, n2 int) []byte {
		return bytes.Join([][]byte{mem[off1 : off1+n1], mem[off2 : off2+n2]}, nil)
	}
	pattern(mem[:64], 1)
	pattern(mem[8192+5:8192+5+4099], 2)
	want := gathered(0, 64, 8192+5, 4099)

	p.postRecv(1, 0, len(want))
	send := rdma.SendWR{ID: 2, Op: rdma.Send, Signaled: true, NumSGE: 2, SGE: [2]rdma.SGE{a.sge(0, 64), a.sge(8192+5, 4099)}}
	a.postSend(send)
	if wc := p.waitOK(p.recvCQ, 1); wc.Bytes != uint32(len(want)) || !bytes.Equal(peer[:len(want)], want) {
		t.Errorf("gathering SEND: %d bytes, equal: %v", wc.Bytes, bytes.Equal(peer[:len(want)], want))
	}
	a.waitOK(a.sendCQ, 2)

	write := send
	write.ID, write.Op, write.RemoteAddr, write.RKey = 3, rdma.Write, p.mr.Addr()+20_001, p.mr.RKey()
	a.postSend(write)
	a.waitOK(a.sendCQ, 3)
	if !bytes.Equal(peer[20_001:20_001+len(want)], want) {
		t.Error("gathering WRITE: data differ")
	}

	read := write
	read.ID, read.Op = 4, rdma.Read
	read.SGE = [2]rdma.SGE{a.sge(50_000, 1000), a.sge(60_001, len(want)-1000)}
	a.postSend(read)
	a.waitOK(a.sendCQ, 4)
	if got := gathered(50_000, 1000, 60_001, len(want)-1000); !bytes.Equal(got, want) {
		t.Error("scattering READ: data differ")
	}
}

func testWriteRead(t *testing.T, s Setup) {
	const room = 1<<20 + 8192
	a, p := connection(t, s, config{memory: 2 * room})
	mem, peer := a.mr.Bytes(), p.mr.Bytes()
	for i, n := range []int{1, 3, 511, 4096, 4097, 65_549, 1 << 20} {
		for _, off := range []int{64, 4096 - 3, 1} {
			clear(peer)
			pattern(mem[off:off+n], n+off)
			a.postSend(a.remoteWR(uint64(i), rdma.Write, off, n, p, 2*off))
			a.waitOK(a.sendCQ, uint64(i))
			wantPattern(t, peer[2*off:2*off+n], n+off)
			if peer[2*off-1] != 0 || peer[2*off+n] != 0 {
				t.Fatalf("WRITE of %d bytes at %d touched its neighbours", n, 2*off)
			}
			// Back into another place.
			clear(mem[room:])
			a.postSend(a.remoteWR(uint64(i), rdma.Read, room+off, n, p, 2*off))
			a.waitOK(a.sendCQ, uint64(i))
			wantPattern(t, mem[room+off:room+off+n], n+off)
			if mem[room+off-1] != 0 || mem[room+off+n] != 0 {
				t.Fatalf("READ of %d bytes to %d touched its neighbours", n, room+off)
			}
		}
	}
	// Nothing needs no key.
	a.postSend(rdma.SendWR{ID: 9, Op: rdma.Write, Signaled: true})
	a.waitOK(a.sendCQ, 9)
	p.none(p.recvCQ)
	// Data of a WRITE is there when a later SEND has arrived.
	for i := range 50 {
		pattern(mem[:5000], i)
		p.postRecv(1, room, 16)
		write := a.remoteWR(2, rdma.Write, 0, 5000, p, 0)
		write.Signaled = false
		a.postSend(write, a.sendWR(3, 0, 16))
		p.waitOK(p.recvCQ, 1)
		wantPattern(t, peer[:5000], i)
		a.waitOK(a.sendCQ, 3)
	}
}

// testRegMR registers memory that exists in several domains. The peer reaches it by the key
// of the domain of its connection, and by no other. It stays when regions are closed.
func testRegMR(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	mem, err := hostmem.Map(8192)
	check(t, err)
	t.Cleanup(func() { check(t, hostmem.Unmap(mem)) })
	pattern(mem, 1)
	other, err := p.id.Device().AllocPD()
	check(t, err)
	first, err := other.RegMR(mem, rdma.AccessRemoteWrite)
	check(t, err)
	mr, err := p.pd.RegMR(mem, rdma.AccessRemoteRead|rdma.AccessRemoteWrite)
	check(t, err)
	again, err := p.pd.RegMR(mem, rdma.AccessRemoteRead)
	check(t, err)
	closer(t, again)
	for _, m := range []rdma.MR{first, mr, again} {
		if m.Addr() != hostmem.Addr(mem) || len(m.Bytes()) != len(mem) || &m.Bytes()[0] != &mem[0] {
			t.Errorf("region of %d bytes at %#x, memory of %d bytes at %#x", len(m.Bytes()), m.Addr(), len(mem), hostmem.Addr(mem))
		}
	}
	if mr.RKey() == again.RKey() {
		t.Errorf("two regions have the key %#x", mr.RKey())
	}
	check(t, first.Close())
	check(t, other.Close()) // nothing of the memory is left there
	wantPattern(t, mem, 1)
	pattern(a.mr.Bytes()[:4096], 2)
	wr := a.remoteWR(1, rdma.Write, 0, 4096, p, 0)
	wr.RemoteAddr, wr.RKey = mr.Addr()+4096, mr.RKey()
	a.postSend(wr)
	a.waitOK(a.sendCQ, 1)
	wantPattern(t, mem[4096:], 2)
	wr.RKey = again.RKey() // for reading only
	a.postSend(wr)
	if wc := a.wait(a.sendCQ, 1)[0]; wc.Status != rdma.WCRemoteAccess {
		t.Errorf("WRITE by a key for reading: %s", wc.Status)
	}
	check(t, mr.Close())
	wantPattern(t, mem[4096:], 2)
}

// testRegMRClose ends one of two regions with the same memory: its key is invalid, and the
// other is not affected.
func testRegMRClose(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	rights := rdma.AccessRemoteRead | rdma.AccessRemoteWrite
	mr, err := p.pd.RegMR(p.mr.Bytes(), rights)
	check(t, err)
	if _, err := p.pd.RegMR(nil, rights); !errors.Is(err, unix.EINVAL) {
		t.Errorf("region without memory: %v", err)
	}
	key := mr.RKey()
	check(t, mr.Close())
	check(t, mr.Close())
	a.postSend(a.remoteWR(1, rdma.Write, 0, 8, p, 0))
	a.waitOK(a.sendCQ, 1)
	old := a.remoteWR(2, rdma.Write, 0, 8, p, 0)
	old.RKey = key
	a.postSend(old)
	if wc := a.wait(a.sendCQ, 1)[0]; wc.Status != rdma.WCRemoteAccess {
		t.Errorf("WRITE by the key of a region that was closed: %s", wc.Status)
	}
}

func testInvalidate(t *testing.T, s Setup) {
	cfg := config{access: rdma.AccessRemoteRead | rdma.AccessRemoteWrite | rdma.AccessRemoteInvalidate}
	if !s.Invalidate {
		pd, err := resolve(t, s, listen(t, s).Addr()).Device().AllocPD()
		check(t, err)
		closer(t, pd)
		if mr, err := pd.AllocMR(4096, cfg.access); !errors.Is(err, rdma.ErrUnsupported) {
			t.Errorf("region %v, error %v", mr, err)
		}
		return
	}
	a, p := connection(t, s, cfg)
	a.postSend(a.remoteWR(1, rdma.Write, 0, 8, p, 0))
	a.waitOK(a.sendCQ, 1)
	p.postRecv(2, 100, 8)
	wr := a.sendWR(3, 0, 8)
	key := p.mr.RKey()
	wr.Op, wr.RKey = rdma.SendInvalidate, key
	a.postSend(wr)
	if wc := p.waitOK(p.recvCQ, 2); wc.Flags != rdma.WCWithInvalidate || wc.InvalidatedKey != key {
		t.Errorf("receive with invalidate: %+v, want key %#x", wc, key)
	}
	a.waitOK(a.sendCQ, 3)
	// The memory can have a new key.
	mr, err := p.pd.RegMR(p.mr.Bytes(), cfg.access)
	check(t, err)
	closer(t, mr)
	renewed := a.remoteWR(4, rdma.Write, 0, 8, p, 0)
	renewed.RKey = mr.RKey()
	a.postSend(renewed)
	a.waitOK(a.sendCQ, 4)
	old := a.remoteWR(5, rdma.Write, 0, 8, p, 0)
	old.RKey = key
	a.postSend(old)
	if wc := a.wait(a.sendCQ, 1)[0]; wc.Status != rdma.WCRemoteAccess {
		t.Errorf("WRITE with an invalidated key: %s", wc.Status)
	}
}

// testInvalidateRefused: a key that was not offered for it cannot be ended. The connection is
// lost, and the region serves the next one.
func testInvalidateRefused(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	p.postRecv(1, 100, 8)
	wr := a.sendWR(2, 0, 8)
	key := p.mr.RKey()
	wr.Op, wr.RKey = rdma.SendInvalidate, key
	a.postSend(wr)
	a.wait(a.sendCQ, 1) // rdma_rxe acknowledges what the responder then finds wrong
	if wc := p.wait(p.recvCQ, 1)[0]; wc.Status == rdma.WCSuccess {
		t.Errorf("receive with invalidate: %+v", wc)
	}
	check(t, errors.Join(a.id.Close(), p.id.Close()))

	// The next connection, in the same domain.
	l := listen(t, s)
	b := newSide(t, resolve(t, s, l.Addr()), config{})
	done := goConnect(within(t, patience), b.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	closer(t, id)
	_, err = id.CreateQP(p.pd, rdma.QPConfig{
		SendCQ: p.sendCQ, RecvCQ: p.recvCQ, MaxSendWR: 16, MaxRecvWR: 16, MaxSendSGE: 2, MaxRecvSGE: 1,
	})
	check(t, err)
	check(t, id.Accept(within(t, patience), connParam(nil)))
	check(t, (<-done).err)
	if p.mr.RKey() != key {
		t.Errorf("the key is %#x, was %#x", p.mr.RKey(), key)
	}
	b.postSend(b.remoteWR(3, rdma.Write, 0, 8, p, 0))
	b.waitOK(b.sendCQ, 3)
	check(t, id.Close()) // before what it used
}

func testRemoteAccess(t *testing.T, s Setup) {
	l := listen(t, s)
	other, otherPeer := connect(t, s, l, config{})
	const size = 8192
	for _, c := range []struct {
		name   string
		access rdma.Access
		wr     func(a, p *side) rdma.SendWR
	}{
		{"wrong key", 0, func(a, p *side) rdma.SendWR {
			wr := a.remoteWR(1, rdma.Write, 0, 64, p, 0)
			wr.RKey ^= 0x5a5a5a00
			return wr
		}},
		{"before the region", 0, func(a, p *side) rdma.SendWR {
			wr := a.remoteWR(1, rdma.Write, 0, 64, p, 0)
			wr.RemoteAddr--
			return wr
		}},
		{"beyond the region", 0, func(a, p *side) rdma.SendWR { return a.remoteWR(1, rdma.Write, 0, 64, p, size-63) }},
		{"READ beyond the region", 0, func(a, p *side) rdma.SendWR { return a.remoteWR(1, rdma.Read, 0, 64, p, size-63) }},
		{"end of the address space", 0, func(a, p *side) rdma.SendWR {
			wr := a.remoteWR(1, rdma.Write, 0, 64, p, 0)
			wr.RemoteAddr = ^uint64(0) - 31
			return wr
		}},
		{"WRITE to read-only", rdma.AccessLocalWrite | rdma.AccessRemoteRead, func(a, p *side) rdma.SendWR {
			return a.remoteWR(1, rdma.Write, 0, 64, p, 0)
		}},
		{"READ from write-only", rdma.AccessRemoteWrite, func(a, p *side) rdma.SendWR {
			return a.remoteWR(1, rdma.Read, 0, 64, p, 0)
		}},
		{"another protection domain", 0, func(a, _ *side) rdma.SendWR {
			return a.remoteWR(1, rdma.Write, 0, 64, otherPeer, 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, p := connect(t, s, l, config{memory: size, access: c.access})
			pattern(a.mr.Bytes(), 9)
			a.postSend(c.wr(a, p), a.sendWR(2, 0, 64))
			wcs := a.wait(a.sendCQ, 2)
			if wcs[0].ID != 1 || wcs[0].Status != rdma.WCRemoteAccess {
				t.Errorf("first completion %d: %s, want 1: %s", wcs[0].ID, wcs[0].Status, rdma.WCRemoteAccess)
			}
			if wcs[1].ID != 2 || wcs[1].Status != rdma.WCFlushErr {
				t.Errorf("second completion %d: %s, want 2: %s", wcs[1].ID, wcs[1].Status, rdma.WCFlushErr)
			}
			if i := bytes.IndexFunc(p.mr.Bytes(), func(r rune) bool { return r != 0 }); i >= 0 {
				t.Errorf("the peer's memory was written at %d", i)
			}
		})
	}
	if i := bytes.IndexFunc(otherPeer.mr.Bytes(), func(r rune) bool { return r != 0 }); i >= 0 {
		t.Errorf("another connection's memory was written at %d", i)
	}
	other.transfer(otherPeer)
}

func testLocalKey(t *testing.T, s Setup) {
	for name, spoil := range map[string]func(*rdma.SGE, *side){
		"wrong key":         func(g *rdma.SGE, _ *side) { g.LKey ^= 0x5a5a5a00 },
		"beyond the region": func(g *rdma.SGE, a *side) { g.Addr = a.mr.Addr() + uint64(len(a.mr.Bytes())) - 63 },
	} {
		t.Run(name, func(t *testing.T) {
			a, p := connection(t, s, config{})
			p.postRecv(1, 0, 64)
			wr := a.sendWR(2, 0, 64)
			spoil(&wr.SGE[0], a)
			if n, err := a.qp.PostSend([]rdma.SendWR{wr}); err != nil {
				if n != 0 {
					t.Errorf("posted %d, and yet %v", n, err)
				}
				return // refused at once: as good
			}
			if wc := a.wait(a.sendCQ, 1)[0]; wc.ID != 2 || wc.Status == rdma.WCSuccess { // rdma_rxe says flushed
				t.Errorf("completion %d: %s, want 2 with an error", wc.ID, wc.Status)
			}
		})
	}
}

func testFailFlushes(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	for i := range 5 {
		a.postRecv(uint64(i), 0, 64)
	}
	sends := make([]rdma.SendWR, 6) // the peer has no receive for them
	for i := range sends {
		sends[i] = a.sendWR(uint64(10+i), 0, 64)
		sends[i].Signaled = i%2 == 0
	}
	a.postSend(sends...)
	a.none(a.sendCQ)
	a.none(a.recvCQ)
	check(t, a.qp.Fail())
	check(t, a.qp.Fail())
	for _, q := range []struct {
		cq    rdma.CQ
		first uint64
		n     int
	}{{a.recvCQ, 0, 5}, {a.sendCQ, 10, 6}} {
		seen := map[uint64]bool{}
		for _, wc := range a.wait(q.cq, q.n) {
			if wc.Status != rdma.WCFlushErr || wc.QPNum != a.qp.Num() {
				t.Errorf("completion %d on QP %d: %s, want flushed on %d", wc.ID, wc.QPNum, wc.Status, a.qp.Num())
			}
			seen[wc.ID] = true
		}
		for i := range q.n {
			if !seen[q.first+uint64(i)] {
				t.Errorf("work request %d was not flushed", q.first+uint64(i))
			}
		}
		a.none(q.cq)
	}
	// What is posted now is flushed or refused. (Receives as well, but rdma_rxe
	// learns of one only when it does something else for the queue pair.)
	if n, err := a.qp.PostSend([]rdma.SendWR{a.sendWR(31, 0, 64)}); err == nil {
		if wc := a.wait(a.sendCQ, n)[0]; wc.ID != 31 || wc.Status != rdma.WCFlushErr {
			t.Errorf("send posted late: %+v", wc)
		}
	}
	// And the peer cannot write here any more.
	clear(a.mr.Bytes()[:64])
	pattern(p.mr.Bytes()[:64], 3)
	p.postSend(p.remoteWR(40, rdma.Write, 0, 64, a, 0))
	if wc := p.wait(p.sendCQ, 1)[0]; wc.Status == rdma.WCSuccess {
		t.Error("the peer wrote through a failed queue pair")
	}
	if len(bytes.Trim(a.mr.Bytes()[:64], "\x00")) != 0 {
		t.Error("memory was written through a failed queue pair")
	}
}

func testFailUnconnected(t *testing.T, s Setup) {
	a := newSide(t, resolve(t, s, listen(t, s).Addr()), config{})
	a.postRecv(1, 0, 64)
	check(t, a.qp.Fail())
	if wc := a.wait(a.recvCQ, 1)[0]; wc.ID != 1 || wc.Status != rdma.WCFlushErr {
		t.Errorf("receive: %+v, want 1 flushed", wc)
	}
}

func testManyQueuePairs(t *testing.T, s Setup) {
	const pairs = 16
	l := listen(t, s)
	ctx := within(t, patience)
	passives := make([]chan *side, pairs)
	for i := range passives {
		passives[i] = make(chan *side, 1)
	}
	var wg sync.WaitGroup
	errs := make(chan error, 2*pairs)
	for i := range pairs {
		wg.Go(func() { errs <- runPassive(ctx, l, passives) })
		wg.Go(func() { errs <- runActive(ctx, s, l.Addr(), i, passives[i]) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

// rounds is how often runActive and runPassive talk.
const rounds = 10

// runActive connects as number n, and then in each round writes a pattern into
// the peer's memory, tells it by a SEND, waits for its answer and reads back.
func runActive(ctx context.Context, s Setup, addr netip.AddrPort, n int, passive <-chan *side) (err error) {
	id, err := s.Active.Resolve(ctx, netip.Addr{}, addr, -1)
	if err != nil {
		return err
	}
	a, err := makeSide(id, config{events: true})
	defer func() { err = errors.Join(err, a.close()) }()
	if err != nil {
		return err
	}
	if _, err := id.Connect(ctx, connParam([]byte{byte(n)})); err != nil {
		return err
	}
	p := <-passive
	const half = 1 << 19
	for r := range rounds {
		off, length := rand.IntN(half/2), 1+rand.IntN(64<<10)
		pattern(a.mr.Bytes()[off:off+length], n+r)
		binary.LittleEndian.PutUint64(a.mr.Bytes()[half:], uint64(off))
		binary.LittleEndian.PutUint64(a.mr.Bytes()[half+8:], uint64(length))
		write := a.remoteWR(1, rdma.Write, off, length, p, off)
		write.Signaled = false
		if _, err := a.qp.PostRecv([]rdma.RecvWR{{ID: 2, SGE: a.sge(half+64, 16)}}); err != nil {
			return err
		}
		if _, err := a.qp.PostSend([]rdma.SendWR{write, a.sendWR(3, half, 16)}); err != nil {
			return err
		}
		if err := a.sleep(a.sendCQ, 3); err != nil {
			return fmt.Errorf("pair %d round %d: WRITE and SEND: %w", n, r, err)
		}
		if err := a.sleep(a.recvCQ, 2); err != nil {
			return fmt.Errorf("pair %d round %d: answer: %w", n, r, err)
		}
		clear(a.mr.Bytes()[off : off+length])
		if _, err := a.qp.PostSend([]rdma.SendWR{a.remoteWR(4, rdma.Read, off, length, p, off)}); err != nil {
			return err
		}
		if err := a.sleep(a.sendCQ, 4); err != nil {
			return fmt.Errorf("pair %d round %d: READ: %w", n, r, err)
		}
		if err := checkPattern(a.mr.Bytes()[off:off+length], n+r); err != nil {
			return fmt.Errorf("pair %d round %d: read back: %w", n, r, err)
		}
	}
	// Not before the peer knows that its last SEND has come: an acknowledgement may
	// be on its way still.
	select {
	case <-passive:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pair %d: the peer does not end", n)
	}
}

// runPassive accepts one connection of runActive and answers it. It closes when
// the peer has.
func runPassive(ctx context.Context, l rdma.Listener, passives []chan *side) (err error) {
	id, err := l.Accept(ctx)
	if err != nil {
		return err
	}
	n := int(id.PrivateData()[0])
	p, err := makeSide(id, config{events: true})
	defer func() { err = errors.Join(err, p.close()) }()
	if err != nil {
		return err
	}
	const half = 1 << 19
	recv := []rdma.RecvWR{{ID: 5, SGE: p.sge(half, 16)}}
	if _, err := p.qp.PostRecv(recv); err != nil {
		return err
	}
	if err := id.Accept(ctx, connParam(nil)); err != nil {
		return err
	}
	passives[n] <- p
	for r := range rounds {
		if err := p.sleep(p.recvCQ, 5); err != nil {
			return fmt.Errorf("pair %d round %d: passive: %w", n, r, err)
		}
		off := binary.LittleEndian.Uint64(p.mr.Bytes()[half:])
		length := binary.LittleEndian.Uint64(p.mr.Bytes()[half+8:])
		if err := checkPattern(p.mr.Bytes()[off:off+length], n+r); err != nil {
			return fmt.Errorf("pair %d round %d: written: %w", n, r, err)
		}
		if _, err := p.qp.PostRecv(recv); err != nil {
			return err
		}
		if _, err := p.qp.PostSend([]rdma.SendWR{p.sendWR(6, 0, 16)}); err != nil {
			return err
		}
		if err := p.sleep(p.sendCQ, 6); err != nil {
			return fmt.Errorf("pair %d round %d: passive: %w", n, r, err)
		}
	}
	close(passives[n])
	select {
	case <-id.Events():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pair %d: the peer's end was not reported", n)
	}
}
