package discovery

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// service is a discovery service without a network: a log of bytes, and what happens when
// it is read.
type service struct {
	mu      sync.Mutex // guards what follows
	log     []byte
	support uint32                           // entry of the log in log page 00h; 0: no such page
	before  func(r initiator.LogRequest)     // called before each read, with the lock
	fail    func(initiator.LogRequest) error // error of a read
	reads   int
	bytes   int
	armed   bool // the last read of the log enables the event
	opened  int
	closed  int
	down    error  // why nobody can connect
	changed func() // of whoever is connected
}

func (s *service) ReadLog(ctx context.Context, r initiator.LogRequest, out []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.Page == nvme.LogSupported {
		if s.support == 0 {
			return nvme.StatusInvalidField
		}
		for i := range 4 {
			out[i] = byte(s.support >> (8 * i))
		}
		return nil
	}
	if s.before != nil {
		s.before(r)
	}
	s.reads++
	s.bytes += len(out)
	if s.fail != nil {
		if err := s.fail(r); err != nil {
			return err
		}
	}
	if r.Offset > uint64(len(s.log)) {
		return nvme.StatusInvalidField
	}
	copy(out, s.log[r.Offset:])
	s.armed = !r.Retain
	return nil
}

func (s *service) Close(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	return nil
}

// set replaces the log and tells whoever is connected.
func (s *service) set(log []byte) {
	s.mu.Lock()
	s.log = log
	changed := s.changed
	s.mu.Unlock()
	if changed != nil {
		changed()
	}
}

func (s *service) open(changed func()) (Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	if s.down != nil {
		return nil, s.down
	}
	s.changed = changed
	return s, nil
}

// network is several services.
type network map[Endpoint]*service

var errNobody = errors.New("nobody listens")

func (n network) open(_ context.Context, at Endpoint) (Conn, error) {
	if s := n[at]; s != nil {
		return s.open(nil)
	}
	return nil, errNobody
}

// at is the endpoint of service i.
func at(i int) Endpoint {
	return Endpoint{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 4420), nvme.DiscoveryNQN}
}

// entry makes an entry that can be used.
func entry(t testing.TB, kind nvme.SubsystemType, to Endpoint) nvme.DiscoveryEntry {
	t.Helper()
	var e nvme.DiscoveryEntry
	e.SetTRTYPE(nvme.TransportRDMA)
	e.SetADRFAM(nvme.AddressIPv4)
	e.SetSUBTYPE(kind)
	e.SetPORTID(1)
	if err := errors.Join(e.SetTRADDR(to.Address.Addr().String()), e.SetTRSVCID("4420"), e.SetSUBNQN(to.NQN)); err != nil {
		t.Fatal(err)
	}
	return e
}

// encode makes a log.
func encode(generation uint64, entries ...nvme.DiscoveryEntry) []byte {
	b := nvme.DiscoveryHeader{GenCtr: generation, NumRec: uint64(len(entries))}.AppendTo(nil)
	for _, e := range entries {
		b = append(b, e[:]...)
	}
	return b
}

// referring makes a log that refers to other services.
func referring(t testing.TB, to ...int) []byte {
	var entries []nvme.DiscoveryEntry
	for _, i := range to {
		entries = append(entries, entry(t, nvme.SubsystemReferral, at(i)))
	}
	return encode(1, entries...)
}
