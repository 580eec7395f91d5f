package discovery

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// walk returns the numbers of the services that were read, and the last error.
func walk(t *testing.T, n network, root int, limits Limits) (read []int, failed map[int]error) {
	t.Helper()
	failed = map[int]error{}
	for p := range Walk(t.Context(), at(root), n.open, limits) {
		i := int(p.From.Address.Addr().As4()[2])<<8 | int(p.From.Address.Addr().As4()[3])
		if p.Err != nil {
			failed[i] = p.Err
		} else {
			read = append(read, i)
		}
	}
	for _, s := range n {
		if s.closed != s.opened {
			t.Errorf("%d of %d connections were closed", s.closed, s.opened)
		}
	}
	return read, failed
}

func TestWalk(t *testing.T) {
	n := network{
		at(1): {log: encode(1, entry(t, nvme.SubsystemReferral, at(2)), entry(t, nvme.SubsystemNVMe, disk(9)), entry(t, nvme.SubsystemReferral, at(3)))},
		at(2): {log: referring(t, 1, 2, 4)}, // back, to itself, and on
		at(3): {log: referring(t, 4, 5)},    // 4 once more, and 5, which is dead
		at(4): {log: referring(t, 2)},
	}
	read, failed := walk(t, n, 1, Limits{})
	if !slices.Equal(read, []int{1, 2, 3, 4}) || len(failed) != 1 || !errors.Is(failed[5], errNobody) {
		t.Errorf("read %v, failed %v", read, failed)
	}
}

// TestWalkHostile: services that refer to others without end are left.
func TestWalkHostile(t *testing.T) {
	chain := network{}
	for i := range 20 {
		chain[at(i)] = &service{log: referring(t, i+1)}
	}
	read, failed := walk(t, chain, 0, Limits{})
	if len(read) != 9 || len(failed) != 1 || !strings.Contains(failed[9].Error(), "chain of more than 8") {
		t.Errorf("a chain of 20: read %v, failed %v", read, failed)
	}

	wide := network{}
	var to []int
	for i := range 3000 {
		wide[at(i)] = &service{log: encode(1)}
		to = append(to, i)
	}
	wide[at(0)].log = referring(t, to...)
	read, failed = walk(t, wide, 0, Limits{})
	if len(read) != 64 || len(failed) != 1 || !strings.Contains(failed[64].Error(), "64 discovery services have been read") {
		t.Errorf("3000 referrals: %d read, failed %v", len(read), failed)
	}

	// Referrals that cannot be used are left out.
	bad := entry(t, nvme.SubsystemReferral, at(2))
	bad.SetTRTYPE(nvme.TransportTCP)
	read, failed = walk(t, network{at(1): {log: encode(1, bad)}}, 1, Limits{})
	if !slices.Equal(read, []int{1}) || len(failed) > 0 {
		t.Errorf("a referral to TCP: read %v, failed %v", read, failed)
	}
}

// TestWalkTime: each service has its time, and the walk ends with its context.
func TestWalkTime(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := network{at(1): {log: referring(t, 2, 3)}, at(3): {log: encode(1)}}
	open := func(ctx context.Context, to Endpoint) (Conn, error) {
		if to == at(2) {
			<-ctx.Done() // a dead address
			return nil, ctx.Err()
		}
		return n.open(ctx, to)
	}
	var read []Endpoint
	for p := range Walk(ctx, at(1), open, Limits{Time: 20 * time.Millisecond}) {
		if p.Err == nil {
			read = append(read, p.From)
		} else if !errors.Is(p.Err, context.DeadlineExceeded) {
			t.Errorf("%v: %v", p.From, p.Err)
		}
	}
	if !slices.Equal(read, []Endpoint{at(1), at(3)}) {
		t.Errorf("read %v", read)
	}
	pages := 0
	for range Walk(ctx, at(1), open, Limits{Time: time.Hour}) {
		pages++
		cancel()
	}
	if pages != 1 {
		t.Errorf("%d pages after the end of the context", pages)
	}
}

// TestWatchFlood: a service that reports changes all the time is not read all the time.
func TestWatchFlood(t *testing.T) {
	s := &service{log: encode(1)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	Watch(ctx, at(1), WatchConfig{
		Open: func(_ context.Context, _ Endpoint, changed func()) (Conn, error) {
			s.before = func(initiator.LogRequest) { changed() }
			return s.open(changed)
		},
		Report: func(Page) {}, Settle: time.Millisecond,
	})
	if s.reads > 2*60 { // two for each time
		t.Errorf("%d reads in a second", s.reads)
	}
}

// TestLinkLocal: an address of a link is on the link of the service that lists it.
func TestLinkLocal(t *testing.T) {
	var e nvme.DiscoveryEntry
	e.SetTRTYPE(nvme.TransportRDMA)
	e.SetADRFAM(nvme.AddressIPv6)
	e.SetSUBTYPE(nvme.SubsystemReferral)
	if err := errors.Join(e.SetTRADDR("fe80::2"), e.SetTRSVCID("4420"), e.SetSUBNQN(nvme.DiscoveryNQN)); err != nil {
		t.Fatal(err)
	}
	p := Page{From: Endpoint{Address: netip.MustParseAddrPort("[fe80::1%eth7]:4420")}, Log: &Log{Entries: []Entry{{DiscoveryEntry: e}}}}
	if got := p.Referrals(); len(got) != 1 || got[0].Address.String() != "[fe80::2%eth7]:4420" {
		t.Errorf("%v", got)
	}
}

// TestWatch: changes are reported, connections follow the referrals, and all of them end.
func TestWatch(t *testing.T) {
	n := network{
		at(1): {log: referring(t, 2)},
		at(2): {log: encode(7, entry(t, nvme.SubsystemNVMe, disk(1)))},
		at(3): {log: encode(1), down: errNobody},
	}
	pages := make(chan Page, 100)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Watch(ctx, at(1), WatchConfig{
			Open: func(_ context.Context, to Endpoint, changed func()) (Conn, error) {
				if s := n[to]; s != nil {
					return s.open(changed)
				}
				return nil, errNobody
			},
			Report: func(p Page) { pages <- p },
			Settle: time.Millisecond, Poll: time.Hour, Retry: time.Millisecond,
		})
	}()
	next := func(from Endpoint) Page {
		t.Helper()
		select {
		case p := <-pages:
			if p.From != from {
				t.Fatalf("page of %v, %v; want %v", p.From, p.Err, from)
			}
			return p
		case <-time.After(20 * time.Second):
			t.Fatalf("no page of %v", from)
		}
		panic("unreachable")
	}
	if p := next(at(1)); p.Err != nil || p.Depth != 0 {
		t.Fatalf("%+v", p)
	}
	if p := next(at(2)); p.Err != nil || p.Depth != 1 || p.Log.Generation != 7 {
		t.Fatalf("%+v", p)
	}
	// A change of the generation alone, as nvmet makes it for other ports, is no news.
	n[at(2)].set(encode(8, entry(t, nvme.SubsystemNVMe, disk(1))))
	n[at(2)].set(encode(9, entry(t, nvme.SubsystemNVMe, disk(1)), entry(t, nvme.SubsystemNVMe, disk(2))))
	if p := next(at(2)); p.Err != nil || len(p.Log.Entries) != 2 {
		t.Fatalf("%+v", p)
	}
	// A log that cannot be read is reported once, and when it can be read again.
	n[at(2)].mu.Lock()
	n[at(2)].fail = func(initiator.LogRequest) error { return initiator.ErrNotConnected }
	n[at(2)].mu.Unlock()
	n[at(2)].changed()
	if p := next(at(2)); !errors.Is(p.Err, initiator.ErrNotConnected) {
		t.Fatalf("%+v", p)
	}
	n[at(2)].mu.Lock()
	n[at(2)].fail = nil
	n[at(2)].mu.Unlock()
	if p := next(at(2)); p.Err != nil || len(p.Log.Entries) != 2 {
		t.Fatalf("%+v", p)
	}
	// Another referral, to a service that comes later.
	n[at(1)].set(referring(t, 3, 1))
	next(at(1))
	if p := next(at(3)); !errors.Is(p.Err, errNobody) || p.Depth != 1 {
		t.Fatalf("%+v", p)
	}
	n[at(3)].mu.Lock()
	n[at(3)].down = nil
	n[at(3)].mu.Unlock()
	if p := next(at(3)); p.Err != nil {
		t.Fatalf("%+v", p)
	}
	cancel()
	<-ended
	for to, want := range map[int]int{1: 1, 2: 1} {
		if s := n[at(to)]; s.opened != want || s.closed != want {
			t.Errorf("service %d: opened %d times, closed %d times", to, s.opened, s.closed)
		}
	}
	if n[at(3)].closed != 1 {
		t.Error("service 3 was not left")
	}
}
