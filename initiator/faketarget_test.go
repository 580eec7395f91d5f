package initiator

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// fakeTarget is as much of a target as the tests of this package need: one
// subsystem with namespaces in memory, and knobs to misbehave. It answers one
// command at a time per connection.
type fakeTarget struct {
	t        testing.TB
	provider *rdmatest.Provider
	listener rdma.Listener
	pd       rdma.PD
	disk     rdma.MR // every namespace is the same memory
	quit     chan struct{}
	running  sync.WaitGroup

	// Knobs, set before the host connects or atomically.
	grant        atomic.Int32 // I/O queues
	killers      atomic.Int32 // commands with which a connection ended
	inCapsule    int
	maxEntries   int
	lbads        uint8
	writeThrough bool // the controller has a volatile cache, the namespaces do not use it
	namespaces   []uint32
	connect      func(nvme.ConnectParams, *nvme.ConnectData) nvme.Status
	intercept    func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) // bool: answer with the status, do nothing else
	tamper       func(qid uint16, c *nvme.Completion) bool               // false: do not answer

	mu        sync.Mutex // guards what follows
	commands  map[nvme.Opcode]int
	byQueue   map[uint16]int
	cc        nvme.CC
	uuid      nvme.UUID // of the namespaces, but for the last byte
	blocks    uint64    // of every namespace, if not what the disk has
	readOnly  bool
	mdts      uint8
	oncs      uint16
	vwc       uint8
	nguid     [16]byte // of every namespace
	crdt      uint16
	anatt     uint8
	looks     int  // first pages of the list of namespaces that were asked for
	record    bool // keep the I/O commands other than reads
	recorded  []nvme.Command
	events    []nvme.AsyncEvent // to be sent
	keys      []byte            // of the last reservation command
	shutdown  bool
	lastID    uint16
	queues    map[uint16]int     // connections of each controller
	asked     map[uint16]int     // I/O queues that were asked for, of each controller
	connected map[[2]uint16]bool // queues that are connected, by controller and number
	immortal  bool               // controllers never end
}

const fakeNQN = "nqn.2026-01.org.example:fake"

var (
	targetAddr = netip.MustParseAddr("192.0.2.1")
	hostAddr   = netip.MustParseAddr("192.0.2.2")
)

func newFakeTarget(t testing.TB, fabric *rdmatest.Fabric, size int) *fakeTarget {
	t.Helper()
	f := &fakeTarget{
		t: t, provider: fabric.Provider(targetAddr), quit: make(chan struct{}),
		inCapsule: 4096, maxEntries: 128, lbads: 9, namespaces: []uint32{1},
		uuid: nvme.NewUUID(), commands: map[nvme.Opcode]int{}, byQueue: map[uint16]int{},
		mdts: 8, oncs: nvme.ONCSDSM | nvme.ONCSWriteZeroes, vwc: nvme.VWCPresent,
		queues: map[uint16]int{}, asked: map[uint16]int{}, connected: map[[2]uint16]bool{},
	}
	f.grant.Store(128)
	var err error
	if f.listener, err = f.provider.Listen(netip.AddrPortFrom(targetAddr, 4420), 16); err != nil {
		t.Fatal(err)
	}
	// The device is reached through an ID; ask for one that leads to ourselves.
	id, err := f.provider.Resolve(context.Background(), netip.Addr{}, netip.AddrPortFrom(targetAddr, 4420), -1)
	if err != nil {
		t.Fatal(err)
	}
	if f.pd, err = id.Device().AllocPD(); err != nil {
		t.Fatal(err)
	}
	id.Close()
	if f.disk, err = f.pd.AllocMR(size, rdma.AccessLocalWrite); err != nil {
		t.Fatal(err)
	}
	f.running.Go(f.accept)
	t.Cleanup(func() {
		close(f.quit)
		f.listener.Close()
		f.running.Wait()
		f.disk.Close()
		f.pd.Close()
	})
	return f
}

func (f *fakeTarget) accept() {
	for {
		id, err := f.listener.Accept(context.Background())
		if err != nil {
			return
		}
		f.running.Go(func() {
			c, err := f.open(id)
			if err != nil {
				f.t.Errorf("fake target: %v", err)
				id.Close()
				return
			}
			c.serve()
			c.close()
		})
	}
}

// fakeConn is one connection of a fake target.
type fakeConn struct {
	f          *fakeTarget
	id         rdma.ID
	qp         rdma.QP
	recv, send rdma.CQ
	in, out    rdma.MR
	depth      int
	capsule    int
	qid        uint16
	cntlid     uint16
	listens    bool   // an Asynchronous Event Request is open
	listener   uint16 // its command id
	head       uint16

	// Arguments of calls through interfaces, which would be allocated each time.
	wrs  [1]rdma.SendWR
	rwrs [1]rdma.RecvWR
	wcs  [1]rdma.WC
	cmd  nvme.Command
	done nvme.Completion
}

func (f *fakeTarget) open(id rdma.ID) (*fakeConn, error) {
	req, err := nvme.ParseRDMARequest(id.PrivateData())
	if err != nil {
		return nil, err
	}
	c := &fakeConn{f: f, id: id, depth: int(req.HSQSize) + 1, capsule: 64, qid: req.QID}
	if req.QID > 0 {
		c.capsule += f.inCapsule
	}
	dev := id.Device()
	if c.in, err = f.pd.AllocMR(c.depth*c.capsule, rdma.AccessLocalWrite); err != nil {
		return nil, err
	}
	if c.out, err = f.pd.AllocMR(MaxQuery+c.depth*16, rdma.AccessLocalWrite); err != nil {
		return nil, err
	}
	if c.recv, err = dev.CreateCQ(c.depth+1, true, 0); err != nil {
		return nil, err
	}
	if c.send, err = dev.CreateCQ(4*c.depth, false, 0); err != nil {
		return nil, err
	}
	c.qp, err = id.CreateQP(f.pd, rdma.QPConfig{SendCQ: c.send, RecvCQ: c.recv, MaxSendWR: 3 * c.depth, MaxRecvWR: c.depth, MaxSendSGE: 1, MaxRecvSGE: 1})
	if err != nil {
		return nil, err
	}
	for i := range c.depth {
		if err := c.receive(uint64(i)); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *fakeConn) receive(i uint64) error {
	c.rwrs[0] = rdma.RecvWR{ID: i, SGE: rdma.SGE{
		Addr: c.in.Addr() + i*uint64(c.capsule), Length: uint32(c.capsule), LKey: c.in.LKey(),
	}}
	_, err := c.qp.PostRecv(c.rwrs[:])
	return err
}

func (c *fakeConn) close() {
	c.f.mu.Lock()
	if !c.f.immortal && c.cntlid > 0 {
		c.f.queues[c.cntlid]--
		delete(c.f.connected, [2]uint16{c.cntlid, c.qid})
	}
	c.f.mu.Unlock()
	c.qp.Fail()
	c.id.Close()
	c.recv.Close()
	c.send.Close()
	c.in.Close()
	c.out.Close()
}

func (c *fakeConn) serve() {
	accept := nvme.RDMAAccept{CRQSize: uint16(c.depth)}.Marshal()
	if err := c.id.Accept(context.Background(), rdma.ConnParam{PrivateData: accept[:], ResponderResources: 16, InitiatorDepth: 16}); err != nil {
		return // the host gave up
	}
	event := make([]byte, 8)
	fds := []unix.PollFd{{Fd: int32(c.recv.FD()), Events: unix.POLLIN}}
	for {
		n, err := c.recv.Poll(c.wcs[:])
		if err != nil {
			return
		}
		if n == 0 {
			select {
			case <-c.f.quit:
				return
			case <-c.id.Events():
				return
			default:
			}
			if err := c.event(); err != nil {
				return
			}
			c.recv.Arm()
			if n, _ = c.recv.Poll(c.wcs[:]); n == 0 {
				unix.Poll(fds, 10)
				if m, _ := unix.Read(c.recv.FD(), event); m == 8 {
					c.recv.Ack(1)
				}
				continue
			}
		}
		wc := c.wcs[0]
		if wc.Status != rdma.WCSuccess {
			return
		}
		at := int(wc.ID) * c.capsule
		if err := c.command(wc.ID, c.in.Bytes()[at:at+int(wc.Bytes)]); err != nil {
			return
		}
	}
}

func (c *fakeConn) command(buffer uint64, capsule []byte) error {
	c.cmd = *nvme.CommandAt(capsule)
	cmd, done := &c.cmd, &c.done
	c.head = (c.head + 1) % uint16(c.depth)
	result, status := uint64(0), nvme.StatusSuccess
	answered := false
	c.f.mu.Lock()
	if c.qid > 0 && cmd.Opcode() != nvme.OpFabrics {
		c.f.commands[cmd.Opcode()]++
		c.f.byQueue[c.qid]++
		if c.f.record && cmd.Opcode() != nvme.OpRead {
			c.f.recorded = append(c.f.recorded, *cmd)
		}
	}
	c.f.mu.Unlock()
	if c.f.intercept != nil {
		status, answered = c.f.intercept(c.qid, cmd)
	}
	if !answered {
		var err error
		if result, status, err = c.execute(cmd, capsule[64:]); err != nil {
			return err
		}
	}
	if status == noAnswer {
		return c.receive(buffer)
	}
	done.Set(result, c.head, cmd.CID(), status)
	if c.f.tamper != nil && !c.f.tamper(c.qid, done) {
		return c.receive(buffer)
	}
	if err := c.receive(buffer); err != nil {
		return err
	}
	return c.respond()
}

// event answers an open Asynchronous Event Request if there is something to say.
func (c *fakeConn) event() error {
	c.f.mu.Lock()
	if !c.listens || len(c.f.events) == 0 {
		c.f.mu.Unlock()
		return nil
	}
	ev := c.f.events[0]
	c.f.events, c.listens = c.f.events[1:], false
	c.f.mu.Unlock()
	c.done.Set(uint64(ev), c.head, c.listener, nvme.StatusSuccess)
	return c.respond()
}

// end ends a controller that was immortal so far, and all after it.
func (f *fakeTarget) end(cntlid uint16) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.immortal = false
	f.queues[cntlid] = 0
	maps.DeleteFunc(f.connected, func(q [2]uint16, _ bool) bool { return q[0] == cntlid })
}

// change changes something about the namespaces, and says so.
func (f *fakeTarget) change(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
	f.events = append(f.events, nvme.NewAsyncEvent(nvme.EventNotice, nvme.NoticeNamespaceChanged, 4))
}

func (c *fakeConn) respond() error {
	copy(c.out.Bytes()[MaxQuery:], c.done[:])
	_, err := c.transfer(rdma.SendWR{Op: rdma.Send, Signaled: true, NumSGE: 1, SGE: [2]rdma.SGE{{Addr: c.out.Addr() + MaxQuery, Length: 16, LKey: c.out.LKey()}}})
	return err
}

const noAnswer nvme.Status = 0x7FFF

// transfer posts one work request and waits for it.
func (c *fakeConn) transfer(wr rdma.SendWR) (nvme.Status, error) {
	c.wrs[0] = wr
	if _, err := c.qp.PostSend(c.wrs[:]); err != nil {
		return 0, err
	}
	for {
		n, err := c.send.Poll(c.wcs[:])
		if err != nil {
			return 0, err
		}
		if n == 1 {
			if c.wcs[0].Status != rdma.WCSuccess {
				return 0, fmt.Errorf("transfer: %v", c.wcs[0].Status)
			}
			return nvme.StatusSuccess, nil
		}
		select {
		case <-c.f.quit:
			return 0, rdma.ErrClosed
		default:
			runtime.Gosched()
		}
	}
}

// move copies between local registered memory and the host's, as the command's
// SGL says.
func (c *fakeConn) move(cmd *nvme.Command, inline []byte, local []byte, addr uint64, lkey uint32) (nvme.Status, error) {
	if _, length, ok := cmd.InCapsuleSGL(); ok {
		if int(length) != len(local) || len(inline) < len(local) {
			return nvme.StatusInvalidField | nvme.StatusDNR, nil
		}
		copy(local, inline)
		return nvme.StatusSuccess, nil
	}
	remote, length, key, _, ok := cmd.KeyedSGL()
	if !ok || int(length) != len(local) {
		return nvme.StatusInvalidField | nvme.StatusDNR, nil
	}
	if len(local) == 0 {
		return nvme.StatusSuccess, nil
	}
	op := rdma.Write
	if nvme.IsWrite(cmd) {
		op = rdma.Read
	}
	return c.transfer(rdma.SendWR{Op: op, Signaled: true, RemoteAddr: remote, RKey: key, NumSGE: 1, SGE: [2]rdma.SGE{{Addr: addr, Length: uint32(len(local)), LKey: lkey}}})
}

// page moves an admin page.
func (c *fakeConn) movePage(cmd *nvme.Command, inline []byte, n int) (nvme.Status, error) {
	return c.move(cmd, inline, c.out.Bytes()[:n], c.out.Addr(), c.out.LKey())
}

func (c *fakeConn) execute(cmd *nvme.Command, inline []byte) (uint64, nvme.Status, error) {
	switch {
	case cmd.Opcode() == nvme.OpFabrics:
		return c.fabrics(cmd, inline)
	case c.qid == 0:
		return c.admin(cmd, inline)
	}
	disk := c.f.disk.Bytes()
	switch cmd.Opcode() {
	case nvme.OpRead, nvme.OpWrite:
		from := cmd.SLBA() << c.f.lbads
		to := from + uint64(cmd.NLB())<<c.f.lbads
		if to > uint64(len(disk)) {
			return 0, nvme.StatusLBAOutOfRange | nvme.StatusDNR, nil
		}
		s, err := c.move(cmd, inline, disk[from:to], c.f.disk.Addr()+from, c.f.disk.LKey())
		return 0, s, err
	case nvme.OpDSM:
		s, err := c.movePage(cmd, inline, 4096)
		if err == nil && s.OK() {
			_, nlb, slba := nvme.DSMRange(c.out.Bytes())
			clear(disk[slba<<c.f.lbads:][:uint64(nlb)<<c.f.lbads])
		}
		return 0, s, err
	case nvme.OpWriteZeroes:
		clear(disk[cmd.SLBA()<<c.f.lbads:][:uint64(cmd.NLB())<<c.f.lbads])
		return 0, nvme.StatusSuccess, nil
	case nvme.OpFlush:
		return 0, nvme.StatusSuccess, nil
	case nvme.OpReservationReport: // each byte is the number of the namespace
		page := c.out.Bytes()[:cmd.ReservationReportLength()]
		for i := range page {
			page[i] = byte(cmd.NSID())
		}
		s, err := c.movePage(cmd, inline, len(page))
		return 0, s, err
	case nvme.OpReservationRegister, nvme.OpReservationAcquire, nvme.OpReservationRelease:
		n := nvme.ReservationKeys
		if cmd.Opcode() == nvme.OpReservationRelease {
			n /= 2
		}
		s, err := c.movePage(cmd, inline, n)
		c.f.mu.Lock()
		c.f.keys = append([]byte(nil), c.out.Bytes()[:n]...)
		c.f.mu.Unlock()
		return 0, s, err
	}
	return 0, nvme.StatusInvalidOpcode | nvme.StatusDNR, nil
}

func (c *fakeConn) fabrics(cmd *nvme.Command, inline []byte) (uint64, nvme.Status, error) {
	switch cmd.FCType() {
	case nvme.FabricsConnect:
		s, err := c.movePage(cmd, inline, nvme.ConnectDataSize)
		if err != nil || !s.OK() {
			return 0, s, err
		}
		data := nvme.ConnectDataAt(c.out.Bytes())
		if c.f.connect != nil {
			if s := c.f.connect(cmd.ConnectParams(), data); !s.OK() {
				return 0, s, nil
			}
		}
		if data.SubNQN() != fakeNQN {
			return uint64(nvme.NewConnectInvalidParam(256, true)), nvme.StatusConnectInvalidParam | nvme.StatusDNR, nil
		}
		c.f.mu.Lock()
		defer c.f.mu.Unlock()
		if c.qid == 0 {
			c.f.lastID++
			c.cntlid = c.f.lastID
		} else if id := data.CNTLID(); c.f.connected[[2]uint16{id, c.qid}] {
			c.f.asked[id]++
			return 0, nvme.StatusCommandSequence | nvme.StatusDNR, nil
		} else if c.f.asked[data.CNTLID()]++; c.f.queues[data.CNTLID()] <= 0 {
			return uint64(nvme.NewConnectInvalidParam(16, true)), nvme.StatusConnectInvalidParam | nvme.StatusDNR, nil
		} else {
			c.cntlid = data.CNTLID()
		}
		c.f.queues[c.cntlid]++
		c.f.connected[[2]uint16{c.cntlid, c.qid}] = true
		return uint64(nvme.NewConnectResult(c.cntlid, false)), nvme.StatusSuccess, nil
	case nvme.FabricsPropertyGet:
		offset, _, _ := cmd.Property()
		c.f.mu.Lock()
		defer c.f.mu.Unlock()
		switch offset {
		case nvme.PropCAP:
			return uint64(nvme.NewCap(uint16(c.f.maxEntries-1), 15, 1)), nvme.StatusSuccess, nil
		case nvme.PropVS:
			return uint64(nvme.NewVersion(2, 1, 0)), nvme.StatusSuccess, nil
		case nvme.PropCSTS:
			shst := uint8(0)
			if c.f.shutdown {
				shst = 2
			}
			return uint64(nvme.NewCSTS(c.f.cc.EN(), false, shst)), nvme.StatusSuccess, nil
		}
		return 0, nvme.StatusInvalidField | nvme.StatusDNR, nil
	case nvme.FabricsPropertySet:
		c.f.mu.Lock()
		defer c.f.mu.Unlock()
		c.f.cc = nvme.CC(cmd.PropertyValue())
		c.f.shutdown = c.f.cc.SHN() != 0
		return 0, nvme.StatusSuccess, nil
	}
	return 0, nvme.StatusInvalidOpcode | nvme.StatusDNR, nil
}

func (c *fakeConn) admin(cmd *nvme.Command, inline []byte) (uint64, nvme.Status, error) {
	switch cmd.Opcode() {
	case nvme.AdminIdentify:
		page := c.out.Bytes()[:4096]
		clear(page)
		switch cmd.CNS() {
		case nvme.CNSController:
			id := nvme.IdentifyControllerAt(page)
			id.SetCNTLID(c.cntlid)
			id.SetKAS(10)
			id.SetSN("fake0")
			id.SetSGLS(nvme.SGLSKeyed | nvme.SGLSOffset)
			id.SetIOCCSZ(uint32(64+c.f.inCapsule) / 16)
			id.SetIORCSZ(1)
			c.f.mu.Lock()
			id.SetONCS(c.f.oncs)
			id.SetVWC(c.f.vwc)
			id.SetMDTS(c.f.mdts)
			id.SetCRDT1(c.f.crdt)
			id.SetANATT(c.f.anatt)
			c.f.mu.Unlock()
			id.SetNN(1024)
			id.SetOAES(nvme.AENNamespaceAttribute)
			id.SetMN("fake")
		case nvme.CNSNamespace:
			ns := nvme.IdentifyNamespaceAt(page)
			blocks := uint64(len(c.f.disk.Bytes())) >> c.f.lbads
			c.f.mu.Lock()
			if c.f.blocks > 0 {
				blocks = c.f.blocks
			}
			if c.f.readOnly {
				ns.SetNSATTR(1)
			}
			c.f.mu.Unlock()
			ns.SetNSZE(blocks)
			ns.SetNCAP(blocks)
			c.f.mu.Lock()
			ns.SetNGUID(c.f.nguid)
			ns.SetLBAFormat(0, nvme.LBAFormat{LBADS: c.f.lbads})
			c.f.mu.Unlock()
		case nvme.CNSActiveNSList:
			var ids []uint32
			c.f.mu.Lock()
			if cmd.NSID() == 0 {
				c.f.looks++
			}
			for _, id := range c.f.namespaces {
				if id > cmd.NSID() && len(ids) < 1024 {
					ids = append(ids, id)
				}
			}
			c.f.mu.Unlock()
			nvme.ActiveNSListAt(page).Set(ids)
		case nvme.CNSNamespaceDescriptors:
			c.f.mu.Lock()
			id := c.f.uuid
			c.f.mu.Unlock()
			if !id.IsZero() {
				id[15] ^= byte(cmd.NSID())
			}
			copy(page, nvme.NamespaceIDs{UUID: id}.AppendTo(nil))
		case nvme.CNSControllerCSI:
		case nvme.CNSNSIndependent:
			if c.f.writeThrough {
				nvme.IdentifyNSIndependentAt(page).SetNSFEAT(nvme.NSIndependentNoVWC)
			}
		default:
			return 0, nvme.StatusInvalidField | nvme.StatusDNR, nil
		}
		s, err := c.movePage(cmd, inline, 4096)
		return 0, s, err
	case nvme.AdminSetFeatures:
		if cmd.FeatureID() == nvme.FeatureNumberOfQueues {
			if n := int(c.f.grant.Load()); n > 0 {
				return uint64(nvme.NumberOfQueues(n)), nvme.StatusSuccess, nil
			}
			return 0, nvme.StatusInternal, nil
		}
		return 0, nvme.StatusSuccess, nil
	case nvme.AdminAsyncEvent:
		c.listens, c.listener = true, cmd.CID()
		return 0, noAnswer, nil
	case nvme.AdminGetLogPage: // each byte is the number of the page
		lid, length, _, _ := cmd.LogPage()
		page := c.out.Bytes()[:min(length, MaxQuery)]
		for i := range page {
			page[i] = lid
		}
		s, err := c.movePage(cmd, inline, len(page))
		return 0, s, err
	case nvme.AdminGetFeatures:
		return uint64(cmd.FeatureID()) << 8, nvme.StatusSuccess, nil
	case nvme.AdminKeepAlive:
		return 0, nvme.StatusSuccess, nil
	}
	return 0, nvme.StatusInvalidOpcode | nvme.StatusDNR, nil
}
