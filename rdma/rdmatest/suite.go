package rdmatest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// Setup describes the providers that Run tests.
type Setup struct {
	Active  rdma.Provider // connects
	Passive rdma.Provider // listens; may be the same
	// Listen is an address of Passive that Active can reach.
	Listen netip.Addr
	// Silent is an address to which Active has a route, but from which it gets no
	// answer. The zero Addr leaves out the test that needs it.
	Silent netip.Addr
	// Invalidate reports whether the provider supports rdma.AccessRemoteInvalidate.
	Invalidate bool
}

// Run is the conformance suite of rdma.Provider. It calls setup at least once for each of
// its subtests. setup may register cleanups. Run closes a provider that is an io.Closer.
func Run(t *testing.T, setup func(t *testing.T) Setup) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Setup)
	}{
		{"Device", testDevice},
		{"Memory", testMemory},
		{"PrivateData", testPrivateData},
		{"PrivateDataTooLong", testPrivateDataTooLong},
		{"Addresses", testAddresses},
		{"Reject", testReject},
		{"NobodyListens", testNobodyListens},
		{"ConnectDeadline", testConnectDeadline},
		{"ConnectCanceled", testConnectCanceled},
		{"ConnectClosed", testConnectClosed},
		{"ResolveDeadline", testResolveDeadline},
		{"AcceptGivenUp", testAcceptGivenUp},
		{"RequestDropped", testRequestDropped},
		{"Churn", testChurn},
		{"ListenerDeadline", testListenerDeadline},
		{"ListenerClose", testListenerClose},
		{"ListenerInUse", testListenerInUse},
		{"TwoListeners", testTwoListeners},
		{"Disconnect", testDisconnect},
		{"CloseDisconnects", testCloseDisconnects},
		{"CloseTwice", testCloseTwice},
		{"CloseUsed", testCloseUsed},
		{"CloseProvider", testCloseProvider},
		{"Send", testSend},
		{"SendBeforeReceive", testSendBeforeReceive},
		{"SendTooLong", testSendTooLong},
		{"Batch", testBatch},
		{"QueueFull", testQueueFull},
		{"TwoElements", testTwoElements},
		{"WriteRead", testWriteRead},
		{"RegMR", testRegMR},
		{"RegMRClose", testRegMRClose},
		{"Invalidate", testInvalidate},
		{"InvalidateRefused", testInvalidateRefused},
		{"RemoteAccess", testRemoteAccess},
		{"LocalKey", testLocalKey},
		{"FailFlushes", testFailFlushes},
		{"FailUnconnected", testFailUnconnected},
		{"EventDescriptor", testEventDescriptor},
		{"EventWhenArmed", testEventWhenArmed},
		{"EventPingPong", testEventPingPong},
		{"EventUnread", testEventUnread},
		{"PollOnly", testPollOnly},
		{"ManyQueuePairs", testManyQueuePairs},
		{"Leaks", testLeaks},
		{"Allocations", testAllocations},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, setup(t)) })
	}
	t.Run("CloseOrder", func(t *testing.T) { testCloseOrder(t, setup) })
}

// patience limits every wait for something that must happen.
const patience = 60 * time.Second

// within returns a context that ends early enough for a failing test to report the
// reason.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// closer closes an object at the end of the test and checks the error.
func closer(t testing.TB, c interface{ Close() error }) {
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// config configures one side of a connection. The zero value means 16 work requests per
// queue and a region of 1 MiB that the peer may use.
type config struct {
	depth  int
	cqe    int // 0: enough for depth
	memory int
	access rdma.Access
	events bool
}

func (c config) withDefaults() config {
	if c.depth == 0 {
		c.depth = 16
	}
	if c.cqe == 0 {
		c.cqe = 2 * c.depth
	}
	if c.memory == 0 {
		c.memory = 1 << 20
	}
	if c.access == 0 {
		c.access = rdma.AccessLocalWrite | rdma.AccessRemoteRead | rdma.AccessRemoteWrite
	}
	return c
}

// side is one side of a connection with its resources.
type side struct {
	t      testing.TB
	id     rdma.ID
	pd     rdma.PD
	sendCQ rdma.CQ
	recvCQ rdma.CQ
	mr     rdma.MR
	qp     rdma.QP
	wcs    [64]rdma.WC
}

// newSide makes the resources of a resolved or requested ID.
func newSide(t testing.TB, id rdma.ID, cfg config) *side {
	t.Helper()
	s, err := makeSide(id, cfg)
	s.t = t
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Errorf("close side: %v", err)
		}
	})
	check(t, err)
	return s
}

// makeSide is like newSide, for goroutines other than the test's. The side must be closed
// even after an error.
func makeSide(id rdma.ID, cfg config) (*side, error) {
	cfg = cfg.withDefaults()
	s := &side{id: id}
	var err error
	if s.pd, err = id.Device().AllocPD(); err != nil {
		return s, err
	}
	if s.mr, err = s.pd.AllocMR(cfg.memory, cfg.access); err != nil {
		return s, err
	}
	if s.sendCQ, err = id.Device().CreateCQ(cfg.cqe, cfg.events, 0); err != nil {
		return s, err
	}
	if s.recvCQ, err = id.Device().CreateCQ(cfg.cqe, cfg.events, 1); err != nil {
		return s, err
	}
	s.qp, err = id.CreateQP(s.pd, rdma.QPConfig{
		SendCQ: s.sendCQ, RecvCQ: s.recvCQ,
		MaxSendWR: cfg.depth, MaxRecvWR: cfg.depth, MaxSendSGE: 2, MaxRecvSGE: 1,
	})
	return s, err
}

// close closes everything in the order that package rdma requires.
func (s *side) close() error {
	errs := []error{s.id.Close()}
	if s.sendCQ != nil {
		errs = append(errs, s.sendCQ.Close())
	}
	if s.recvCQ != nil {
		errs = append(errs, s.recvCQ.Close())
	}
	if s.mr != nil {
		errs = append(errs, s.mr.Close())
	}
	if s.pd != nil {
		errs = append(errs, s.pd.Close())
	}
	return errors.Join(errs...)
}

// sge returns the SGE of a piece of the side's region.
func (s *side) sge(off, length int) rdma.SGE {
	return rdma.SGE{Addr: s.mr.Addr() + uint64(off), Length: uint32(length), LKey: s.mr.LKey()}
}

func (s *side) sendWR(id uint64, off, length int) rdma.SendWR {
	return rdma.SendWR{ID: id, Op: rdma.Send, Signaled: true, NumSGE: 1, SGE: [2]rdma.SGE{s.sge(off, length)}}
}

// remoteWR returns an RDMA READ or WRITE between a piece of the local region and a piece
// of the same length of the peer's region.
func (s *side) remoteWR(id uint64, op rdma.SendOp, off, length int, peer *side, peerOff int) rdma.SendWR {
	wr := s.sendWR(id, off, length)
	wr.Op, wr.RemoteAddr, wr.RKey = op, peer.mr.Addr()+uint64(peerOff), peer.mr.RKey()
	return wr
}

func (s *side) postSend(wrs ...rdma.SendWR) {
	s.t.Helper()
	if n, err := s.qp.PostSend(wrs); err != nil || n != len(wrs) {
		s.t.Fatalf("posted %d of %d sends: %v", n, len(wrs), err)
	}
}

func (s *side) postRecv(id uint64, off, length int) {
	s.t.Helper()
	if n, err := s.qp.PostRecv([]rdma.RecvWR{{ID: id, SGE: s.sge(off, length)}}); err != nil || n != 1 {
		s.t.Fatalf("posted %d of 1 receives: %v", n, err)
	}
}

var errTooFew = errors.New("completions that were expected did not come")

// collect polls for exactly n completions.
func (s *side) collect(cq rdma.CQ, n int) ([]rdma.WC, error) {
	var got []rdma.WC
	for deadline := time.Now().Add(patience); len(got) < n; {
		k, err := cq.Poll(s.wcs[:min(n-len(got), len(s.wcs))])
		if err != nil {
			return got, err
		}
		got = append(got, s.wcs[:k]...)
		if k > 0 {
			continue
		}
		if time.Now().After(deadline) {
			return got, fmt.Errorf("%d of %d: %w", len(got), n, errTooFew)
		}
		runtime.Gosched()
	}
	return got, nil
}

func (s *side) wait(cq rdma.CQ, n int) []rdma.WC {
	s.t.Helper()
	got, err := s.collect(cq, n)
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}

// expect waits for one completion, which must have this ID and be a success.
func (s *side) expect(cq rdma.CQ, id uint64) error {
	if _, err := s.collect(cq, 1); err != nil {
		return err
	}
	return s.isOK(id)
}

// isOK checks the completion that was polled last.
func (s *side) isOK(id uint64) error {
	if wc := s.wcs[0]; wc.Status != rdma.WCSuccess || wc.ID != id || wc.QPNum != s.qp.Num() {
		return fmt.Errorf("completion of %d on QP %d: %s, want success of %d on QP %d", wc.ID, wc.QPNum, wc.Status, id, s.qp.Num())
	}
	return nil
}

// sleep is like expect, for a queue with events. It sleeps in the way that hazard 3 of
// package rdma requires.
func (s *side) sleep(cq rdma.CQ, id uint64) error {
	for armed := false; ; {
		n, err := cq.Poll(s.wcs[:1])
		switch {
		case err != nil:
			return err
		case n == 1:
			return s.isOK(id)
		case armed:
			err = waitEvent(cq)
		default:
			err = cq.Arm()
		}
		if err != nil {
			return err
		}
		armed = !armed
	}
}

// waitOK is like expect, and returns the completion.
func (s *side) waitOK(cq rdma.CQ, id uint64) rdma.WC {
	s.t.Helper()
	if err := s.expect(cq, id); err != nil {
		s.t.Fatal(err)
	}
	return s.wcs[0]
}

// none checks that a completion queue is empty.
func (s *side) none(cq rdma.CQ) {
	s.t.Helper()
	if n, err := cq.Poll(s.wcs[:]); n != 0 || err != nil {
		s.t.Fatalf("%d unexpected completions, first %+v, error %v", n, s.wcs[0], err)
	}
}

// readEvent reads one event of a CQ. It returns false if there is none.
func readEvent(cq rdma.CQ) (bool, error) {
	var buf [8]byte
	n, err := unix.Read(cq.FD(), buf[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, nil
	case err != nil || n != len(buf):
		return false, fmt.Errorf("read event: %d bytes, %w", n, err)
	}
	return true, nil
}

// noEvent checks that there is no event.
func noEvent(t testing.TB, cq rdma.CQ, why string) {
	t.Helper()
	if got, err := readEvent(cq); got || err != nil {
		t.Fatalf("unexpected event: %s (error %v)", why, err)
	}
}

// waitEvent sleeps until there is an event, reads it and acknowledges it.
func waitEvent(cq rdma.CQ) error {
	fds := []unix.PollFd{{Fd: int32(cq.FD()), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(patience.Milliseconds()))
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Poll(fds, int(patience.Milliseconds()))
	}
	if err != nil || n == 0 {
		return fmt.Errorf("no event came (error %w)", err)
	}
	got, err := readEvent(cq)
	if err != nil {
		return err
	}
	if !got {
		return errors.New("poll said readable, read found no event")
	}
	cq.Ack(1)
	return nil
}

// connParam suits all tests: READs in both directions, patience with missing receives,
// but little with a dead peer. (rdma_rxe interprets a retry count of 7 as "forever".)
func connParam(private []byte) rdma.ConnParam {
	return rdma.ConnParam{
		PrivateData: private, ResponderResources: 4, InitiatorDepth: 4,
		RetryCount: 2, RNRRetryCount: 7, FlowControl: true,
	}
}

// listen makes a listener that is closed at the end of the test.
func listen(t testing.TB, s Setup) rdma.Listener {
	t.Helper()
	l, err := s.Passive.Listen(netip.AddrPortFrom(s.Listen, 0), 16)
	check(t, err)
	closer(t, l)
	return l
}

// resolve makes an ID for a listener. The ID is closed at the end of the test.
func resolve(t testing.TB, s Setup, to netip.AddrPort) rdma.ID {
	t.Helper()
	id, err := s.Active.Resolve(within(t, patience), netip.Addr{}, to, -1)
	check(t, err)
	closer(t, id)
	return id
}

// connected is the result of Connect.
type connected struct {
	private []byte
	err     error
}

// goConnect connects on a new goroutine.
func goConnect(ctx context.Context, id rdma.ID, private []byte) <-chan connected {
	done := make(chan connected, 1)
	go func() {
		private, err := id.Connect(ctx, connParam(private))
		done <- connected{private, err}
	}()
	return done
}

// connect makes a connection through l.
func connect(t testing.TB, s Setup, l rdma.Listener, cfg config) (active, passive *side) {
	t.Helper()
	active = newSide(t, resolve(t, s, l.Addr()), cfg)
	done := goConnect(within(t, patience), active.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	passive = newSide(t, id, cfg)
	check(t, id.Accept(within(t, patience), connParam(nil)))
	check(t, (<-done).err)
	return active, passive
}

// connection makes a connection.
func connection(t testing.TB, s Setup, cfg config) (active, passive *side) {
	t.Helper()
	return connect(t, s, listen(t, s), cfg)
}

// waitEventType waits for the next connection event, which must have this type.
func waitEventType(t testing.TB, id rdma.ID, want rdma.EventType) {
	t.Helper()
	select {
	case ev := <-id.Events():
		if ev.Type != want {
			t.Fatalf("event %q (%s), want %q", ev.Type, ev.Detail, want)
		}
	case <-within(t, patience).Done():
		t.Fatalf("no event, want %q", want)
	}
}

// pattern fills b with bytes that depend on seed and position.
func pattern(b []byte, seed int) {
	for i := range b {
		b[i] = byte(i*7 + i>>8 + seed*31 + 1)
	}
}

// checkPattern checks that b is what pattern wrote.
func checkPattern(b []byte, seed int) error {
	want := make([]byte, len(b))
	pattern(want, seed)
	for i := range b {
		if b[i] != want[i] {
			return fmt.Errorf("%d bytes differ from pattern %d, first at %d: %#x, want %#x", len(b), seed, i, b[i], want[i])
		}
	}
	return nil
}

func wantPattern(t testing.TB, b []byte, seed int) {
	t.Helper()
	if err := checkPattern(b, seed); err != nil {
		t.Fatal(err)
	}
}
