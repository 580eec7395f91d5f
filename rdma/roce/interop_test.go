package roce

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"testing"
	"time"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma"
)

// TestRping is the server of rping, of rdma-core, which runs over another
// implementation: the kernel's rdma_rxe, or a card. UN_RPING is the address and
// port to listen on, of a network namespace without rdma_rxe. The client
//
//	rping -c -V -a ADDR -p PORT -C 20 -S 60000
//
// tells where its data is; the server READs it, and WRITEs it back to where the
// client tells next. The client compares.
func TestRping(t *testing.T) {
	at, err := netip.ParseAddrPort(os.Getenv("UN_RPING"))
	testenv.Need(t, "rping", err)
	p, err := New(Config{Addrs: []netip.Addr{at.Addr()}})
	check(t, err)
	defer func() { check(t, p.Close()) }()
	l, err := p.Listen(at, 1)
	check(t, err)
	defer func() { check(t, l.Close()) }()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	id, err := l.Accept(ctx)
	check(t, err)

	t.Run("client", func(t *testing.T) { // its cleanups come before those above
		const data = 64 << 10
		e := newEnd(t, id, 16, data+4096, false)
		const in, out = data, data + 64
		e.recv(1, in, 16)
		e.recv(1, in+16, 16)
		check(t, id.Accept(ctx, rdma.ConnParam{ResponderResources: 1, InitiatorDepth: 1, RetryCount: 7, RNRRetryCount: 7}))
		var wc [1]rdma.WC
		messages := 0
		for {
			n, err := e.recvCQ.Poll(wc[:])
			check(t, err)
			if n == 0 {
				select {
				case ev := <-id.Events():
					if ev.Type != rdma.EventDisconnected || messages == 0 || messages%2 != 0 {
						t.Errorf("event %v after %d messages", ev, messages)
					}
					t.Logf("%d messages, %+v", messages, p.Snapshot())
					return
				case <-ctx.Done():
					t.Fatal("the client does nothing")
				case <-time.After(100 * time.Microsecond): // leave the CPU to the client
				}
				continue
			}
			if wc[0].Status != rdma.WCSuccess {
				continue // flushed
			}
			// Where the client's data is: address, key, length.
			m := e.mr.Bytes()[in+16*(messages%2):]
			wr := rdma.SendWR{
				ID: 2, Op: rdma.Read, Signaled: true, NumSGE: 1,
				RemoteAddr: binary.BigEndian.Uint64(m), RKey: binary.BigEndian.Uint32(m[8:]),
			}
			wr.SGE[0] = e.sge(0, int(min(binary.BigEndian.Uint32(m[12:]), data)))
			if messages%2 == 1 {
				wr.Op = rdma.Write
			}
			e.recv(1, in+16*(messages%2), 16)
			messages++
			e.post(wr)
			e.ok(e.sendCQ, 2)
			e.post(rdma.SendWR{ID: 3, Op: rdma.Send, Signaled: true, NumSGE: 1, SGE: [2]rdma.SGE{e.sge(out, 16)}})
			e.ok(e.sendCQ, 3)
		}
	})
}
