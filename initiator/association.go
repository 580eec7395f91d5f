package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// association is one admin connection with the I/O queue pairs that belong to
// it. It is made from zero by associate, and given up as a whole.
type association struct {
	life     context.Context // ends when the association is lost; its cause is the first reason
	end      context.CancelCauseFunc
	alive    sync.WaitGroup // the goroutine that sends Keep Alive commands
	remote   netip.AddrPort // of the target
	admin    *admin
	cntlid   uint16
	cap      nvme.Cap
	version  nvme.Version
	identify nvme.IdentifyController
	depth    int               // of the I/O queues
	plan     poller.Assignment // of the granted queues to classes and loops
	pairs    []*queuePair
	removed  atomic.Bool     // the RDMA device goes away
	watching sync.WaitGroup  // the goroutines that hear of each connection
	born     time.Time       // when the target made the controller
	found    map[uint32]bool // namespaces that were identified since the last event
	known    bool            // the last look at namespaces left nothing unknown
	reported map[string]bool // what tolerate has logged
	unknown  error           // the last one that tolerate took
	changed  chan struct{}   // namespaces have to be looked at
}

// fail says that the association is lost. Only the first reason counts. Any
// goroutine.
func (a *association) fail(err error) { a.end(err) }

// during returns a context that ends with ctx and with the association.
func (a *association) during(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(a.life, func() { cancel(context.Cause(a.life)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// lookAtNamespaces has the namespaces looked at soon. Any goroutine.
func (a *association) lookAtNamespaces() {
	select {
	case a.changed <- struct{}{}:
	default: // a look is due already
	}
}

// leaveDevice answers the removal of the RDMA device. There are drivers that wait
// until nobody uses it.
func (c *Controller) leaveDevice(removed bool) {
	if !removed {
		return
	}
	if err := c.mem.leave(); err != nil {
		c.cfg.Log.Warn("leave RDMA device", "error", err)
	}
}

// StepError says which step of setting up an association failed.
type StepError struct {
	Step string
	Err  error
}

func (e *StepError) Error() string { return e.Step + ": " + e.Err.Error() }
func (e *StepError) Unwrap() error { return e.Err }

// ErrNoQueues is a target that granted no I/O queue.
var ErrNoQueues = errors.New("target granted no I/O queues")

// associate goes through every step of connecting, in the order of Linux'
// nvme_rdma_setup_ctrl. What it returns is connected and idle: no lane knows of
// it yet.
func (c *Controller) associate(ctx context.Context) (a *association, err error) {
	a = &association{found: make(map[uint32]bool), reported: make(map[string]bool), changed: make(chan struct{}, 1)}
	a.life, a.end = context.WithCancelCause(c.life)
	ctx, cancel := a.during(ctx)
	defer cancel()
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
			c.leaveDevice(a.removed.Load() || errors.Is(err, rdma.ErrNoDevice))
			a = nil
		}
	}()
	for _, step := range []struct {
		name string
		run  func(context.Context, *association) error
	}{
		{"connect admin queue", c.connectAdmin},
		{"enable controller", c.enable},
		{"keep controller alive", c.startKeepAlive},
		{"identify controller", c.identifyController},
		{"negotiate I/O queues", c.negotiate},
		{"connect I/O queues", c.connectIO},
		{"configure events", c.configureEvents},
	} {
		if err := step.run(ctx, a); err != nil {
			return a, &StepError{step.name, err}
		}
	}
	return a, nil
}

func (c *Controller) connectAdmin(ctx context.Context, a *association) error {
	p := queueParam{qid: 0, depth: adminDepth, events: true}
	conn, remote, err := c.reach(ctx, p)
	if err != nil {
		return err
	}
	a.remote = remote
	if a.admin, err = newAdmin(conn, c.mem.domain(), min(c.cfg.ConnectTimeout, c.cfg.AdminTimeout), a.fail); err != nil {
		return errors.Join(err, conn.close())
	}
	a.watch(conn)

	var data nvme.ConnectData
	if err := c.fillConnect(&data, 0xFFFF); err != nil {
		return err
	}
	var cmd nvme.Command
	cmd.SetConnect(0, adminDepth-1, uint32(c.cfg.KeepAlive/time.Millisecond), c.cfg.DisableSQFlow)
	asked := time.Now()
	done, err := a.admin.exec(ctx, &cmd, data[:], nil)
	if err != nil {
		return connectError(done, err)
	}
	r := nvme.ConnectResult(done.DW0())
	if r.AuthRequired() || r.SecureChannelRequired() {
		return errors.New("target requires authentication, which is not supported")
	}
	a.cntlid, a.born = r.CNTLID(), time.Now()
	if c.cfg.Made != nil {
		c.cfg.Made(a.remote, a.cntlid, asked)
	}
	return nil
}

func (c *Controller) fillConnect(data *nvme.ConnectData, cntlid uint16) error {
	data.SetHostID(c.cfg.HostID)
	data.SetCNTLID(cntlid)
	if err := data.SetSubNQN(c.cfg.SubNQN); err != nil {
		return err
	}
	return data.SetHostNQN(c.cfg.HostNQN)
}

// connectError adds what the target said about a refused Connect.
func connectError(done nvme.Completion, err error) error {
	var s nvme.Status
	if !errors.As(err, &s) {
		return err
	}
	if s.Code() == nvme.StatusConnectInvalidParam {
		return fmt.Errorf("%w (%w)", ConnectStatus(s), ConnectParam(done.DW0()))
	}
	return ConnectStatus(s)
}

// ConnectStatus is the status with which a target refused a Connect command.
type ConnectStatus nvme.Status

func (s ConnectStatus) Error() string { return "target refused: " + nvme.Status(s).FabricsString() }

// ConnectParam names the field that the target refused. It comes with a
// ConnectStatus of StatusConnectInvalidParam.
type ConnectParam nvme.ConnectInvalidParam

func (p ConnectParam) Error() string { return nvme.ConnectInvalidParam(p).String() }

// IsSubNQN says that the target does not know the subsystem.
func (p ConnectParam) IsSubNQN() bool { return p.in(256) }

// IsHostNQN says that the target does not like the host's name.
func (p ConnectParam) IsHostNQN() bool { return p.in(512) }

// IsCNTLID says that the target has no such controller of this host.
func (p ConnectParam) IsCNTLID() bool {
	q := nvme.ConnectInvalidParam(p)
	return q.InData() && q.Offset() == 16
}

// in reports whether p points into the name at byte offset of the Connect data.
func (p ConnectParam) in(offset uint16) bool {
	q := nvme.ConnectInvalidParam(p)
	return q.InData() && q.Offset() >= offset && q.Offset() < offset+256
}

// maxInCapsule bounds the data in a capsule, whatever the controller takes: beyond
// it a transfer by key is cheaper.
const maxInCapsule = 64 << 10

// maxReady bounds the time that a controller may take to become ready. CRTO can
// name nine hours.
const maxReady = 5 * time.Minute

// enable brings the controller from whatever it was to ready.
func (c *Controller) enable(ctx context.Context, a *association) error {
	v, err := a.admin.getProperty(ctx, nvme.PropCAP, true)
	if err != nil {
		return fmt.Errorf("read CAP: %w", err)
	}
	a.cap = nvme.Cap(v)
	css := uint8(nvme.CCSelectNVM)
	if a.cap.CSS()&(1<<6) != 0 {
		css = nvme.CCSelectAll
	}
	cc := nvme.NewCC(css)
	if err := a.admin.setProperty(ctx, nvme.PropCC, uint64(cc)); err != nil {
		return fmt.Errorf("write CC: %w", err)
	}
	ready := time.Duration(a.cap.TO()) * 500 * time.Millisecond
	if a.cap.CRWMS() {
		v, err := a.admin.getProperty(ctx, nvme.PropCRTO, false)
		if err != nil {
			return fmt.Errorf("read CRTO: %w", err)
		}
		ready = max(ready, time.Duration(nvme.CRTO(v).CRWMT())*500*time.Millisecond)
	}
	if err := a.admin.setProperty(ctx, nvme.PropCC, uint64(cc.WithEN(true))); err != nil {
		return fmt.Errorf("write CC.EN: %w", err)
	}
	if err := a.waitStatus(ctx, min(max(ready, time.Second), maxReady), nvme.CSTS.RDY); err != nil {
		return fmt.Errorf("wait until ready: %w", err)
	}
	v, err = a.admin.getProperty(ctx, nvme.PropVS, false)
	if err != nil {
		return fmt.Errorf("read VS: %w", err)
	}
	a.version = nvme.Version(v)
	return nil
}

// waitStatus reads CSTS until cond holds.
func (a *association) waitStatus(ctx context.Context, limit time.Duration, cond func(nvme.CSTS) bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		v, err := a.admin.getProperty(ctx, nvme.PropCSTS, false)
		if err != nil {
			return fmt.Errorf("read CSTS: %w", err)
		}
		csts := nvme.CSTS(v)
		switch {
		case cond(csts):
			return nil
		case csts.CFS():
			return errors.New("controller reports a fatal status")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *Controller) identifyController(ctx context.Context, a *association) error {
	id := &a.identify
	if err := a.admin.identify(ctx, nvme.CNSController, 0, (*[adminPage]byte)(id)); err != nil {
		return err
	}
	switch {
	case id.CNTLID() != a.cntlid:
		return fmt.Errorf("controller id %d, connected to %d", id.CNTLID(), a.cntlid)
	case id.KAS() == 0:
		return errors.New("controller does not support keep alive")
	case id.IOCCSZ() < 4 || id.IORCSZ() < 1:
		return fmt.Errorf("capsule sizes %d and %d (in 16 bytes) are below 4 and 1", id.IOCCSZ(), id.IORCSZ())
	case id.ICDOFF() != 0:
		return fmt.Errorf("in-capsule data offset %d is not supported", id.ICDOFF())
	case id.SGLS()&nvme.SGLSKeyed == 0:
		return errors.New("controller does not support keyed SGLs")
	}
	a.depth = min(c.cfg.QueueSize, int(a.cap.MQES())+1)
	if m := int(id.MAXCMD()); m > 0 {
		a.depth = min(a.depth, m)
	}
	return nil
}

func (c *Controller) negotiate(ctx context.Context, a *association) error {
	asked := c.cfg.Queues.Total()
	granted, err := a.admin.setFeature(ctx, nvme.FeatureNumberOfQueues, nvme.NumberOfQueues(asked))
	if s := nvme.Status(0); errors.As(err, &s) {
		return fmt.Errorf("%w: %w", ErrNoQueues, s)
	}
	if err != nil {
		return err
	}
	a.plan = poller.Assign(c.cfg.Queues, nvme.GrantedQueues(granted), len(c.lanes))
	if a.plan.Queues() == 0 {
		return ErrNoQueues
	}
	return nil
}

func (c *Controller) connectIO(ctx context.Context, a *association) error {
	for i, owner := range a.plan.Owner {
		p, err := c.connectQueuePair(ctx, a, uint16(i+1), owner)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i+1, err)
		}
		a.pairs = append(a.pairs, p)
		a.watch(p.connection)
	}
	return nil
}

func (c *Controller) connectQueuePair(ctx context.Context, a *association, qid uint16, owner int) (*queuePair, error) {
	class := a.plan.ClassOf(int(qid))
	q := queueParam{
		remote: a.remote, qid: qid, depth: a.depth, cntlid: a.cntlid,
		events: class != poller.Poll, vector: owner,
	}
	conn, err := c.dial(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := c.establish(ctx, conn, q); err != nil {
		return nil, errors.Join(err, conn.close())
	}
	page := <-a.admin.buffers
	flow, err := c.connectCommand(ctx, conn, q, a.admin.mr, page*adminPage)
	if err != nil {
		return nil, errors.Join(err, conn.close())
	}
	a.admin.buffers <- page
	inCapsule := uint32(0)
	if a.identify.SGLS()&nvme.SGLSOffset != 0 {
		inCapsule = uint32(min(a.identify.InCapsuleBytes(), maxInCapsule))
	}
	return newQueuePair(a, conn, c.lanes[owner], class, inCapsule, flow), nil
}

// connectCommand makes the connection an I/O queue, and reports whether the
// target does SQ flow control. The command's data are at an offset of mr.
func (c *Controller) connectCommand(ctx context.Context, conn *connection, q queueParam, mr rdma.MR, at int) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.IOTimeout)
	defer cancel()
	data := nvme.ConnectDataAt(mr.Bytes()[at:])
	*data = nvme.ConnectData{}
	if err := c.fillConnect(data, q.cntlid); err != nil {
		return false, err
	}
	var cmd nvme.Command
	cmd.SetConnect(q.qid, uint16(q.depth-1), 0, c.cfg.DisableSQFlow)
	cmd.SetKeyedSGL(mr.Addr()+uint64(at), nvme.ConnectDataSize, mr.RKey(), false)
	done, err := conn.call(ctx, &cmd)
	if err != nil {
		return false, err
	}
	if s := done.Status(); !s.OK() {
		return false, connectError(done, s)
	}
	return done.SQHead() != 0xFFFF, nil
}

// configureEvents asks for the asynchronous events that we understand, as far
// as the controller has them.
func (c *Controller) configureEvents(ctx context.Context, a *association) error {
	mask := a.identify.OAES() & (nvme.AENNamespaceAttribute | nvme.AENFirmwareActivation | nvme.AENANAChange)
	if mask == 0 {
		return nil
	}
	_, err := a.admin.setFeature(ctx, nvme.FeatureAsyncEvent, mask)
	var s nvme.Status
	if errors.As(err, &s) {
		c.cfg.Log.Warn("target refused the event configuration", "status", s.String())
		return nil
	}
	return err
}

// shutdown tells the controller that we leave.
func (a *association) shutdown(ctx context.Context) error {
	limit := 5 * time.Second // NVME shutdown_timeout
	if us := a.identify.RTD3E(); us > 0 {
		limit = max(limit, min(time.Duration(us)*time.Microsecond, time.Minute))
	}
	cc := nvme.NewCC(nvme.CCSelectNVM)
	if a.cap.CSS()&(1<<6) != 0 {
		cc = nvme.NewCC(nvme.CCSelectAll)
	}
	if err := a.admin.setProperty(ctx, nvme.PropCC, uint64(cc.WithEN(true).WithSHN(nvme.ShutdownNormal))); err != nil {
		return fmt.Errorf("write CC.SHN: %w", err)
	}
	return a.waitStatus(ctx, limit, func(s nvme.CSTS) bool { return s.SHST() == 2 })
}

// watch takes what happens to a connection for its loss, but for a port that is
// down: adapters send again when it is back, and keep alive tells if it is not.
func (a *association) watch(conn *connection) {
	a.watching.Add(1)
	go func() {
		defer a.watching.Done()
		for ev := range conn.id.Events() {
			switch ev.Type {
			case rdma.EventPortDown:
				continue
			case rdma.EventDeviceRemoved:
				a.removed.Store(true)
			}
			a.fail(fmt.Errorf("queue %d: %v", conn.qid, ev.Type))
		}
	}()
}

// close ends every connection of the association, I/O queues first. No lane may
// know of it any more.
func (a *association) close() error {
	a.end(rdma.ErrClosed)
	a.alive.Wait()
	var errs []error
	for _, p := range a.pairs {
		errs = append(errs, p.close())
	}
	if a.admin != nil {
		errs = append(errs, a.admin.close())
	}
	a.watching.Wait()
	return errors.Join(errs...)
}
