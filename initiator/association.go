package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// association is an admin connection with the I/O queue pairs that belong to it.
// associate makes it from nothing, and it is given up as a whole.
type association struct {
	ctrl     *Controller
	life     context.Context // ends when the association is lost; its cause is the first reason
	end      context.CancelCauseFunc
	alive    sync.WaitGroup // the goroutine that sends Keep Alive commands
	remote   netip.AddrPort // of the target
	admin    *admin
	cntlid   uint16
	cap      nvme.Cap
	version  nvme.Version
	identify nvme.IdentifyController
	method   string            // how the admin queue was authenticated; empty: not. Controller.mu guards it once the association is in use
	depth    int               // of the I/O queues
	plan     poller.Assignment // of the granted queues to classes and loops
	pairs    []*queuePair
	watching sync.WaitGroup  // the goroutines that read the events of the connections
	asked    time.Time       // when the controller was requested
	found    map[uint32]bool // namespaces that were identified since the last event
	known    bool            // the last look at the namespaces left nothing unknown
	ana      anaStates
	reread   chan struct{}    // the ANA log must be read
	settled  bool             // the last look found access to all namespaces of the path
	turned   bool             // the last look changed the access to a namespace
	refused  map[uint32]error // why namespaces are not used over this association; guarded by the controller's mu
	remnant  *remnant         // what is left of it when it is lost; set before its requests are recovered
	vouching                  // of its target, for other controllers
	reported map[string]bool  // the steps whose errors tolerate has logged
	unknown  error            // the last error that tolerate accepted
	changed  chan struct{}    // the namespaces must be looked at
}

// fail reports that the association is lost. Only the first reason counts. Any goroutine
// may call it.
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

// lookAtNamespaces requests a look at the namespaces. Any goroutine may call it.
func (a *association) lookAtNamespaces() {
	select {
	case a.changed <- struct{}{}:
	default: // a look is due already
	}
}

// readANA requests that the ANA log is read. Any goroutine may call it.
func (a *association) readANA() {
	select {
	case a.reread <- struct{}{}:
	default: // it will be read already
	}
}

// leaveDevice releases the RDMA device if it is removed, because some drivers wait until
// nothing uses the device. The path has no association.
func (c *Controller) leaveDevice() {
	select {
	case <-c.mem.removed():
	default:
		return
	}
	c.borrowed.Wait()
	if err := c.mem.leave(); err != nil {
		c.cfg.Log.Warn("leave RDMA device", "error", err)
	}
}

// borrow keeps the device of an association from being left, until borrowed is done. It returns
// false if the association has ended.
func (c *Controller) borrow(a *association) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.life.Err() != nil || c.state == StateDeleting {
		return false
	}
	c.borrowed.Add(1)
	return true
}

// StepError names the step of setting up an association that failed.
type StepError struct {
	Step string
	Err  error
}

func (e *StepError) Error() string { return e.Step + ": " + e.Err.Error() }
func (e *StepError) Unwrap() error { return e.Err }

// ErrNoQueues means that the target granted no I/O queues.
var ErrNoQueues = errors.New("target granted no I/O queues")

func (c *Controller) newAssociation() *association {
	a := &association{ctrl: c, found: make(map[uint32]bool), reported: make(map[string]bool), changed: make(chan struct{}, 1), reread: make(chan struct{}, 1)}
	a.life, a.end = context.WithCancelCause(c.life)
	return a
}

// associate performs all steps of connecting, in the order of Linux'
// nvme_rdma_setup_ctrl. The association that it returns is connected and idle, and no
// lane uses it yet.
func (c *Controller) associate(ctx context.Context) (a *association, err error) {
	a = c.newAssociation()
	ctx, cancel := a.during(ctx)
	defer cancel()
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
			a = nil
		}
	}()
	for _, step := range []struct {
		name string
		run  func(context.Context, *association) error
		io   bool // only for a controller with I/O queues
	}{
		{"connect admin queue", c.connectAdmin, false},
		{"enable controller", c.enable, false},
		{"keep controller alive", c.startKeepAlive, false},
		{"identify controller", c.identifyController, false},
		{"compare with the other paths", c.checkSubsystem, true},
		{"negotiate I/O queues", c.negotiate, true},
		{"connect I/O queues", c.connectIO, true},
		{"configure events", c.configureEvents, false},
	} {
		if step.io && c.cfg.Discovery {
			continue
		}
		if err := step.run(ctx, a); err != nil {
			return a, &StepError{step.name, err}
		}
	}
	return a, nil
}

func (c *Controller) connectAdmin(ctx context.Context, a *association) error {
	asked, err := c.openAdmin(ctx, a)
	if err == nil {
		a.method, err = c.authenticate(ctx, 0, asked, a.admin.authPort)
	}
	return err
}

// openAdmin connects the admin queue, up to what the target asks for in its answer.
func (c *Controller) openAdmin(ctx context.Context, a *association) (r nvme.ConnectResult, err error) {
	p := queueParam{qid: 0, depth: adminDepth, events: true}
	conn, remote, err := c.reach(ctx, p)
	if err != nil {
		return 0, err
	}
	a.remote = remote
	if a.admin, err = newAdmin(conn, c.mem.current(), min(c.cfg.ConnectTimeout, c.cfg.AdminTimeout), a.fail); err != nil {
		return 0, errors.Join(err, conn.close())
	}
	a.watch(conn)

	var data nvme.ConnectData
	if err := c.fillConnect(&data, 0xFFFF); err != nil {
		return 0, err
	}
	var cmd nvme.Command
	cmd.SetConnect(0, adminDepth-1, uint32(c.cfg.KeepAlive/time.Millisecond), c.cfg.DisableSQFlow)
	asked := time.Now()
	done, err := a.admin.exec(ctx, &cmd, data[:], nil)
	if err != nil {
		return 0, connectError(done, err)
	}
	r = nvme.ConnectResult(done.DW0())
	a.cntlid, a.asked = r.CNTLID(), asked
	if c.cfg.Made != nil {
		c.cfg.Made(a.remote, a.cntlid, asked)
	}
	return r, nil
}

func (c *Controller) fillConnect(data *nvme.ConnectData, cntlid uint16) error {
	data.SetHostID(c.cfg.HostID)
	data.SetCNTLID(cntlid)
	if err := data.SetSubNQN(c.cfg.SubNQN); err != nil {
		return err
	}
	return data.SetHostNQN(c.cfg.HostNQN)
}

// connectError adds the target's reason to the error of a refused Connect.
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

// IsSubNQN reports whether the target does not know the subsystem.
func (p ConnectParam) IsSubNQN() bool { return p.in(256) }

// IsHostNQN reports whether the target refuses the host NQN.
func (p ConnectParam) IsHostNQN() bool { return p.in(512) }

// IsCNTLID reports whether the target has no such controller for this host.
func (p ConnectParam) IsCNTLID() bool {
	q := nvme.ConnectInvalidParam(p)
	return q.InData() && q.Offset() == 16
}

// in reports whether p points into the NQN at this byte offset of the Connect data.
func (p ConnectParam) in(offset uint16) bool {
	q := nvme.ConnectInvalidParam(p)
	return q.InData() && q.Offset() >= offset && q.Offset() < offset+256
}

// maxInCapsule limits the data in a capsule, even if the controller accepts more. For
// more data, a transfer by key costs less.
const maxInCapsule = 64 << 10

// maxReady limits the time that a controller may take to become ready. CRTO can name nine
// hours.
const maxReady = 5 * time.Minute

// enable clears CC.EN, sets it, and waits until the controller is ready.
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

// waitStatus reads CSTS until cond returns true.
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
	case id.SGLS()&nvme.SGLSKeyed == 0:
		return errors.New("controller does not support keyed SGLs")
	case c.cfg.Discovery:
		return checkDiscovery(id)
	case id.CNTRLTYPE() == nvme.ControllerTypeDiscovery:
		return errors.New("controller is a discovery controller, which has no namespaces")
	case id.KAS() == 0:
		return errors.New("controller does not support keep alive")
	case id.IOCCSZ() < 4 || id.IORCSZ() < 1:
		return fmt.Errorf("capsule sizes %d and %d (in 16 bytes) are below 4 and 1", id.IOCCSZ(), id.IORCSZ())
	case id.ICDOFF() != 0:
		return fmt.Errorf("in-capsule data offset %d is not supported", id.ICDOFF())
	}
	a.depth = min(c.cfg.QueueSize, int(a.cap.MQES())+1)
	if m := int(id.MAXCMD()); m > 0 {
		a.depth = min(a.depth, m)
	}
	return nil
}

// checkDiscovery checks what a discovery controller says of itself. Older ones do not
// give their type, and nvmet's give no keep alive granularity although they support the
// command.
func checkDiscovery(id *nvme.IdentifyController) error {
	if t := id.CNTRLTYPE(); t != 0 && t != nvme.ControllerTypeDiscovery {
		return fmt.Errorf("controller is no discovery controller (type %d)", t)
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
	a.plan = poller.Assign(c.cfg.Queues, nvme.GrantedQueues(granted), len(c.sub.lanes))
	if a.plan.Queues() == 0 {
		return ErrNoQueues
	}
	a.plan.Mapping = a.plan.Rotate(c.slot) // short grants of several paths do not meet on one loop
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
		events: class != poller.Poll, vector: owner, descriptors: a.descriptors(),
	}
	conn, err := c.dial(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := c.establish(ctx, conn, q); err != nil {
		return nil, errors.Join(err, conn.close())
	}
	buffer := <-a.admin.buffers
	done, err := c.connectCommand(ctx, conn, q, a.admin.mr, buffer*adminBuffer)
	method := ""
	if err == nil {
		method, err = c.authenticate(ctx, qid, nvme.ConnectResult(done.DW0()), conn.authPort(a.admin, buffer))
	}
	if err != nil {
		return nil, errors.Join(err, conn.close())
	}
	a.admin.buffers <- buffer
	inCapsule := uint32(0)
	if a.identify.SGLS()&nvme.SGLSOffset != 0 {
		inCapsule = uint32(min(a.identify.InCapsuleBytes(), maxInCapsule))
	}
	flow := done.SQHead() != 0xFFFF
	p := newQueuePair(a, conn, c.sub.lanes[owner], class, inCapsule, flow)
	p.descriptors, p.proved = q.descriptors, method != ""
	return p, nil
}

// descriptors returns in how many places the data of an I/O command may be.
func (a *association) descriptors() int {
	return min(a.identify.KeyedDescriptors(), block.MaxSegments)
}

// segments returns in how many places the data of a request should be at most, because more take
// longer than a copy.
func (a *association) segments() int {
	if a.admin.conn.id.Device().Attr().Software {
		return 1
	}
	return a.descriptors()
}

// traces returns the traces of the connections.
func (a *association) traces() (all []string) {
	add := func(c *connection) {
		if t, ok := c.id.(rdma.Traced); ok && t.Trace() != "" {
			all = append(all, t.Trace())
		}
	}
	add(a.admin.conn)
	for _, p := range a.pairs {
		add(p.connection)
	}
	return all
}

// connectCommand makes the connection an I/O queue. SQHD in the completion is 0xFFFF if the
// target does not use SQ flow control. The data of the command are at offset at of mr.
func (c *Controller) connectCommand(ctx context.Context, conn *connection, q queueParam, mr rdma.MR, at int) (nvme.Completion, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.IOTimeout)
	defer cancel()
	data := nvme.ConnectDataAt(mr.Bytes()[at:])
	*data = nvme.ConnectData{}
	if err := c.fillConnect(data, q.cntlid); err != nil {
		return nvme.Completion{}, err
	}
	var cmd nvme.Command
	cmd.SetConnect(q.qid, uint16(q.depth-1), 0, c.cfg.DisableSQFlow)
	cmd.SetKeyedSGL(mr.Addr()+uint64(at), nvme.ConnectDataSize, mr.RKey(), false)
	done, err := conn.call(ctx, &cmd)
	if err != nil {
		return done, err
	}
	if s := done.Status(); !s.OK() {
		return done, connectError(done, s)
	}
	return done, nil
}

// configureEvents requests the asynchronous events that handleEvent understands, as far
// as the controller supports them.
func (c *Controller) configureEvents(ctx context.Context, a *association) error {
	mask := a.identify.OAES() & (nvme.AENNamespaceAttribute | nvme.AENFirmwareActivation | nvme.AENANAChange)
	if c.cfg.Discovery {
		mask = a.identify.OAES() & nvme.AENDiscoveryChange
	}
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

// shutdown tells the controller that the host leaves.
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

// watch ends the association when an event reports the end of a connection.
func (a *association) watch(conn *connection) {
	a.watching.Add(1)
	go func() {
		defer a.watching.Done()
		for ev := range conn.id.Events() {
			a.event(ev, conn.qid)
		}
	}()
}

// event handles an event of a queue's connection. EventPortDown ends the association if there
// is another path. Otherwise it does not: adapters send again when the port is back, and if it
// does not come back keep alive fails.
func (a *association) event(ev rdma.Event, qid uint16) {
	reason := LossDisconnected
	switch ev.Type {
	case rdma.EventPortDown:
		if !a.ctrl.sub.others(a.ctrl) {
			return
		}
		reason = LossLinkDown
	case rdma.EventDeviceRemoved:
		reason = LossDeviceRemoved
	}
	a.fail(because(reason, fmt.Errorf("queue %d: %v", qid, ev.Type)))
}

// close closes all connections of the association, I/O queues first. No lane may use the
// association any more.
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
