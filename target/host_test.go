package target

import (
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

const (
	testNQN  = "nqn.2026-01.org.example:disk"
	hostNQN  = "nqn.2026-01.org.example:host"
	dataSize = 2 << 20
	patience = 10 * time.Second
)

var (
	targetAddr = netip.MustParseAddr("192.0.2.1")
	hostAddr   = netip.MustParseAddr("192.0.2.2")
	hostID     = nvme.UUID{1, 2, 3}
)

// rig is a target with one subsystem on its own fabric.
type rig struct {
	t      testing.TB
	fabric *rdmatest.Fabric
	target *Target
	subsys *Subsystem
	host   *rdmatest.Provider
	hostID nvme.UUID // of the next connections
}

func newRig(t testing.TB, cfg Config, sub SubsystemConfig) *rig {
	t.Helper()
	r := &rig{t: t, fabric: rdmatest.NewFabric(), hostID: hostID}
	r.host = r.fabric.Provider(hostAddr)
	var err error
	if r.target, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.target.Close(); err != nil {
			t.Error(err)
		}
		if left := r.fabric.Objects(); left != (rdmatest.Objects{}) {
			t.Errorf("objects are left: %+v", left)
		}
	})
	if _, err := r.target.AddPorts(PortConfig{r.fabric.Provider(targetAddr), netip.AddrPortFrom(targetAddr, 4420)}); err != nil {
		t.Fatal(err)
	}
	sub.NQN = testNQN
	if sub.AllowHosts == nil {
		sub.AllowAny = true
	}
	if r.subsys, err = r.target.AddSubsystem(sub); err != nil {
		t.Fatal(err)
	}
	return r
}

// newDisk returns a rig with a namespace in memory.
func newDisk(t testing.TB, cfg Config, size int64, ns NamespaceConfig) (*rig, *RAM, *Namespace) {
	t.Helper()
	r := newRig(t, cfg, SubsystemConfig{})
	ram := NewRAM(size)
	ns.Store = ram
	n, err := r.subsys.AddNamespace(ns)
	if err != nil {
		t.Fatal(err)
	}
	return r, ram, n
}

// hostQueue is the host's side of a queue. It does not use the initiator.
type hostQueue struct {
	t        testing.TB
	id       rdma.ID
	pd       rdma.PD
	cq       rdma.CQ
	qp       rdma.QP
	in, out  rdma.MR
	data     rdma.MR
	entries  int
	capsule  int
	next     int
	cntlid   uint16
	hostID   nvme.UUID
	wcs      [1]rdma.WC
	armed    bool
	fds      [1]unix.PollFd
	token    [8]byte
	swrs     [1]rdma.SendWR
	rwrs     [1]rdma.RecvWR
	response nvme.Completion
	bytes    uint32 // length of the response
	key      uint32 // the key that it invalidates
}

// dial makes a connection. The error is that of the rejection.
func (r *rig) dial(qid uint16, entries int) (*hostQueue, error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h := &hostQueue{t: r.t, hostID: r.hostID, entries: entries, capsule: nvme.CommandSize + maxInCapsule}
	must := func(err error) {
		if err != nil {
			r.t.Helper()
			r.t.Fatal(err)
		}
	}
	var err error
	h.id, err = r.host.Resolve(ctx, netip.Addr{}, netip.AddrPortFrom(targetAddr, 4420), -1)
	must(err)
	h.pd, err = h.id.Device().AllocPD()
	must(err)
	h.in, err = h.pd.AllocMR(2*entries*nvme.CompletionSize, rdma.AccessLocalWrite)
	must(err)
	h.out, err = h.pd.AllocMR(entries*h.capsule, 0)
	must(err)
	h.data, err = h.pd.AllocMR(dataSize, rdma.AccessLocalWrite|rdma.AccessRemoteRead|rdma.AccessRemoteWrite|rdma.AccessRemoteInvalidate)
	must(err)
	h.cq, err = h.id.Device().CreateCQ(8*entries, true, 0)
	must(err)
	h.qp, err = h.id.CreateQP(h.pd, rdma.QPConfig{SendCQ: h.cq, RecvCQ: h.cq, MaxSendWR: 2 * entries, MaxRecvWR: 2 * entries, MaxSendSGE: 1, MaxRecvSGE: 1})
	must(err)
	for i := range 2 * entries {
		h.receive(uint64(i))
	}
	r.t.Cleanup(h.close)
	private := nvme.RDMARequest{QID: qid, HRQSize: uint16(entries), HSQSize: uint16(entries - 1)}.Marshal()
	_, err = h.id.Connect(ctx, rdma.ConnParam{PrivateData: private[:], ResponderResources: 16, RetryCount: 7, RNRRetryCount: 7})
	return h, err
}

func (h *hostQueue) close() {
	h.id.Close()
	h.cq.Close()
	h.in.Close()
	h.out.Close()
	h.data.Close()
	h.pd.Close()
}

func (h *hostQueue) receive(i uint64) {
	h.rwrs[0] = rdma.RecvWR{ID: 1<<32 | i, SGE: rdma.SGE{Addr: h.in.Addr() + i*nvme.CompletionSize, Length: nvme.CompletionSize, LKey: h.in.LKey()}}
	if _, err := h.qp.PostRecv(h.rwrs[:]); err != nil {
		h.t.Error(err)
	}
}

// send sends a command with in-capsule data.
func (h *hostQueue) send(cmd *nvme.Command, inline []byte) {
	at := h.next % h.entries * h.capsule
	h.next++
	b := h.out.Bytes()[at : at+h.capsule]
	copy(b, cmd[:])
	copy(b[nvme.CommandSize:], inline)
	h.sendRaw(at, nvme.CommandSize+len(inline))
}

func (h *hostQueue) sendRaw(at, n int) {
	h.swrs[0] = rdma.SendWR{Op: rdma.Send, Signaled: true, NumSGE: 1, SGE: [2]rdma.SGE{{Addr: h.out.Addr() + uint64(at), Length: uint32(n), LKey: h.out.LKey()}}}
	if _, err := h.qp.PostSend(h.swrs[:]); err != nil {
		h.t.Fatal(err)
	}
}

// await waits for a response. It returns false when the connection has ended.
func (h *hostQueue) await() bool {
	for deadline := time.Now().Add(patience); ; {
		n, err := h.cq.Poll(h.wcs[:])
		if err != nil {
			h.t.Fatal(err)
		}
		if n == 0 {
			if len(h.id.Events()) > 0 {
				return false
			}
			if time.Now().After(deadline) {
				h.t.Fatal("no response")
			}
			h.wait()
			continue
		}
		wc := &h.wcs[0]
		if wc.Status != rdma.WCSuccess {
			return false
		}
		if !wc.Recv {
			continue
		}
		i := uint64(uint32(wc.ID))
		h.response = *nvme.CompletionAt(h.in.Bytes()[i*nvme.CompletionSize:])
		h.bytes, h.key = wc.Bytes, 0
		if wc.Flags&rdma.WCWithInvalidate != 0 {
			h.key = wc.InvalidatedKey
		}
		h.receive(i)
		return true
	}
}

// wait sleeps until there may be a completion, or an event of the connection.
func (h *hostQueue) wait() {
	if !h.armed {
		h.armed = true
		if err := h.cq.Arm(); err != nil {
			h.t.Fatal(err)
		}
		return // the caller polls once more
	}
	h.fds[0] = unix.PollFd{Fd: int32(h.cq.FD()), Events: unix.POLLIN}
	unix.Poll(h.fds[:], 5)
	if n, _ := unix.Read(h.cq.FD(), h.token[:]); n == len(h.token) {
		h.cq.Ack(1)
		h.armed = false
	}
}

// do executes a command and returns its response.
func (h *hostQueue) do(cmd *nvme.Command, inline []byte) *nvme.Completion {
	h.t.Helper()
	cmd.SetCID(uint16(h.next) + 100)
	h.send(cmd, inline)
	if !h.await() {
		h.t.Fatalf("connection ended in %v", cmd)
	}
	if h.response.CID() != cmd.CID() {
		h.t.Fatalf("%v: response %v", cmd, &h.response)
	}
	return &h.response
}

// want executes a command and checks its status.
func (h *hostQueue) want(s nvme.Status, cmd *nvme.Command, inline ...byte) *nvme.Completion {
	h.t.Helper()
	c := h.do(cmd, inline)
	if c.Status() != s {
		h.t.Fatalf("%v: status %v, want %v", cmd, c.Status(), s)
	}
	return c
}

// keyed makes the first n bytes of h.data the data of a command.
func (h *hostQueue) keyed(cmd *nvme.Command, n int) *nvme.Command {
	cmd.SetKeyedSGL(h.data.Addr(), uint32(n), h.data.RKey(), false)
	return cmd
}

// connectCommand prepares a Connect command with its data in h.data.
func (h *hostQueue) connectCommand(nqn string, qid, cntlid uint16, kato uint32) (*nvme.Command, *nvme.ConnectData) {
	data := nvme.ConnectDataAt(h.data.Bytes())
	clear(data[:])
	data.SetHostID(h.hostID)
	data.SetCNTLID(cntlid)
	for _, err := range []error{data.SetSubNQN(nqn), data.SetHostNQN(hostNQN)} {
		if err != nil {
			h.t.Fatal(err)
		}
	}
	cmd := new(nvme.Command)
	cmd.SetConnect(qid, uint16(h.entries-1), kato, false)
	return h.keyed(cmd, nvme.ConnectDataSize), data
}

func (r *rig) mustDial(qid uint16, entries int) *hostQueue {
	r.t.Helper()
	h, err := r.dial(qid, entries)
	if err != nil {
		r.t.Fatal(err)
	}
	return h
}

// admin connects an admin queue and enables the controller.
func (r *rig) admin(nqn string) *hostQueue {
	r.t.Helper()
	h := r.mustDial(0, adminDepth)
	cmd, _ := h.connectCommand(nqn, 0, nvme.CNTLIDDynamic, 0)
	h.cntlid = nvme.ConnectResult(h.want(0, cmd).DW0()).CNTLID()
	h.setCC(nvme.NewCC(nvme.CCSelectNVM).WithEN(true))
	return h
}

// io connects an I/O queue.
func (r *rig) io(admin *hostQueue, qid uint16, entries int) *hostQueue {
	r.t.Helper()
	h := r.mustDial(qid, entries)
	cmd, _ := h.connectCommand(testNQN, qid, admin.cntlid, 0)
	h.want(0, cmd)
	return h
}

func (h *hostQueue) setCC(cc nvme.CC) {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetPropertySet(nvme.PropCC, uint64(cc), false)
	h.want(0, &cmd)
}

// untilStatus waits for a controller status.
func (h *hostQueue) untilStatus(want nvme.CSTS) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		got := nvme.CSTS(h.property(nvme.PropCSTS, false))
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("status %v, want %v", got, want)
		}
	}
}

func (h *hostQueue) property(offset uint32, size8 bool) uint64 {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetPropertyGet(offset, size8)
	return h.want(0, &cmd).Result()
}

func (h *hostQueue) identify(cns uint8, nsid uint32) []byte {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetIdentify(cns, nsid, 0)
	h.want(0, h.keyed(&cmd, nvme.IdentifySize))
	return h.data.Bytes()[:nvme.IdentifySize]
}

func (h *hostQueue) log(lid uint8, n int) []byte {
	h.t.Helper()
	return h.logWith(lid, 0, n)
}

// logWith is log with a log specific parameter.
func (h *hostQueue) logWith(lid, specific uint8, n int) []byte {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetGetLogPage(lid, 0, uint32(n), 0, false)
	cmd.SetLogSpecific(specific)
	h.want(0, h.keyed(&cmd, n))
	return h.data.Bytes()[:n]
}

// pattern fills b with bytes that depend on seed and position.
func pattern(b []byte, seed uint64) {
	for i := 0; i+8 <= len(b); i += 8 {
		seed = seed*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], seed)
	}
}
