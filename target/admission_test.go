package target

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// knock sends a connect request and returns the result. The connection stays open
// without a Connect command.
func (r *rig) knock(t *testing.T, from netip.Addr) (rdma.ID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	id, err := r.fabric.Provider(from).Resolve(ctx, netip.Addr{}, netip.AddrPortFrom(targetAddr, 4420), -1)
	if err != nil {
		t.Fatal(err)
	}
	pd, err := id.Device().AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	cq, err := id.Device().CreateCQ(4, false, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := id.CreateQP(pd, rdma.QPConfig{SendCQ: cq, RecvCQ: cq, MaxSendWR: 1, MaxRecvWR: 1, MaxSendSGE: 1, MaxRecvSGE: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { id.Close(); cq.Close(); pd.Close() })
	private := nvme.RDMARequest{QID: 1, HRQSize: 128, HSQSize: 127}.Marshal()
	_, err = id.Connect(ctx, rdma.ConnParam{PrivateData: private[:]})
	return id, err
}

// TestStrangers: hosts that connect and send no Connect command use few resources of
// the target, and do not keep other hosts out.
func TestStrangers(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	most := func() (queues, unconnected int, memory int64) {
		r.target.mu.Lock()
		defer r.target.mu.Unlock()
		for q := range r.target.queues {
			if q.host == hostAddr {
				continue
			}
			queues++
			memory += int64(len(q.in.Bytes()) + len(q.out.Bytes()) + len(q.data.Bytes()))
		}
		return queues, len(r.target.admission.unconnected), memory
	}
	for i := range 4 * maxUnconnected {
		from := netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 7)})
		if i%3 == 0 {
			from = netip.AddrFrom4([4]byte{198, 51, 100, 99}) // another host, which has more connections
		}
		_, _ = r.knock(t, from)
		if queues, unconnected, memory := most(); queues > 2*maxUnconnected || unconnected > maxUnconnected || memory > int64(queues)*64<<10 {
			t.Fatalf("%d queues, %d without Connect, %d bytes", queues, unconnected, memory)
		}
		if i%50 == 0 {
			r.io(a, uint16(1+i/50), 128)
		}
	}
	if _, unconnected, _ := most(); unconnected != maxUnconnected {
		t.Errorf("%d without Connect", unconnected)
	}
	a.property(nvme.PropCSTS, false)
	if n := r.target.Snapshot().Refusals["connection: "+whyGaveWay]; n < 2*maxUnconnected {
		t.Errorf("%d connections gave way", n)
	}
	// One host has its own limit.
	for range 2 * maxUnconnectedPerHost {
		_, _ = r.knock(t, netip.AddrFrom4([4]byte{203, 0, 113, 1}))
	}
	r.target.mu.Lock()
	n := 0
	for _, q := range r.target.admission.unconnected {
		if q.host == netip.AddrFrom4([4]byte{203, 0, 113, 1}) {
			n++
		}
	}
	r.target.mu.Unlock()
	if n > maxUnconnectedPerHost {
		t.Errorf("%d of one host", n)
	}
}

// TestStrangersMakeRoom: hosts that connect all the time and send no Connect command do
// not end the connection of another host before its Connect command arrives.
func TestStrangersMakeRoom(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	strangers := func(n int) {
		for i := range n {
			_, _ = r.knock(t, netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 4)}))
		}
	}
	strangers(2 * maxUnconnected)
	h := r.mustDial(0, adminDepth)
	strangers(2 * maxUnconnected)
	cmd, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	h.want(0, cmd)
}

// TestEnding: while connections that gave way end, their hosts get no other
// connections, but new hosts do.
func TestEnding(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	busy, other := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")
	r.target.mu.Lock()
	a := &r.target.admission
	a.ending, a.endingOf[busy] = maxUnconnected/2, maxUnconnected/2
	r.target.mu.Unlock()
	if err := r.target.admit(busy); err == nil {
		t.Error("a host whose connections end gets another one")
	}
	if err := r.target.admit(other); err != nil {
		t.Errorf("another host gets none: %v", err)
	}
	r.target.ended(other, nil)
}

// TestLimits: the connections of one host and the memory of queues are limited, and are
// available again when they are not used any more.
func TestLimits(t *testing.T) {
	r, _, _ := newDisk(t, Config{MaxPerHost: 4, QueueMemory: 6 << 20}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN) // 1 MiB and 2 KiB
	first := r.io(a, 1, 128)
	full := r.mustDial(2, 128)
	cmd, _ := full.connectCommand(testNQN, 2, a.cntlid, 0)
	full.want(nvme.StatusConnectControllerBusy, cmd)
	other := r.mustDial(0, adminDepth)
	if _, err := r.dial(0, adminDepth); err == nil {
		t.Error("a fifth connection is accepted")
	}
	if err := first.id.Disconnect(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		cmd, _ := full.connectCommand(testNQN, 2, a.cntlid, 0)
		if full.do(cmd, nil).Status().OK() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the memory of a queue that ended is not free")
		}
	}
	// This is too little for a second controller, and nothing is left of it.
	cmd, _ = other.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	other.want(nvme.StatusConnectControllerBusy, cmd)
	s := r.target.Snapshot()
	if len(s.Controllers) != 1 || s.Refusals["no memory"] < 2 || s.Refusals["connection: no resources"] != 1 {
		t.Errorf("%d controllers, refused %v", len(s.Controllers), s.Refusals)
	}
}

// TestRefusalsAreCounted: refusals are counted by reason, and logged at a limited rate.
func TestRefusalsAreCounted(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	r := newRig(t, Config{Log: log}, SubsystemConfig{AllowHosts: []string{"nqn.other"}})
	h := r.mustDial(0, adminDepth)
	const n = 3 * loglimit.Burst
	for range n {
		cmd, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
		h.want(nvme.StatusConnectInvalidHost|dnr, cmd)
	}
	cmd, _ := h.connectCommand("nqn.\x1b[2J\nx", 0, nvme.CNTLIDDynamic, 0)
	h.want(nvme.StatusConnectInvalidParam|dnr, cmd)
	if s := r.target.Snapshot(); s.Refusals["host not allowed"] != n || s.Refusals["unknown subsystem"] != 1 {
		t.Errorf("refused %v", s.Refusals)
	}
	if err := r.target.Close(); err != nil {
		t.Error(err)
	}
	text := out.String()
	if lines := strings.Count(text, "\n"); !strings.Contains(text, `reason="host not allowed"`) || strings.ContainsRune(text, '\x1b') || lines > loglimit.Burst+20 {
		t.Errorf("%d lines: %s", lines, text)
	}
}

// TestNamelessHost: a host without a name may connect where every host may.
func TestNamelessHost(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	connect := func(qid, cntlid uint16) *hostQueue {
		t.Helper()
		h := r.mustDial(qid, adminDepth)
		cmd, data := h.connectCommand(testNQN, qid, cntlid, 0)
		clear(data[512:768])
		h.cntlid = nvme.ConnectResult(h.want(0, cmd).DW0()).CNTLID()
		return h
	}
	a := connect(0, nvme.CNTLIDDynamic)
	a.setCC(nvme.NewCC(nvme.CCSelectNVM).WithEN(true))
	var cmd nvme.Command
	cmd.SetFlush(1)
	connect(1, a.cntlid).want(0, &cmd)
	if c := r.target.Snapshot().Controllers; len(c) != 1 || c[0].HostNQN != "" {
		t.Errorf("%+v", c)
	}
	if fmt.Sprint(r.target.Snapshot().Refusals) != "map[]" {
		t.Error(r.target.Snapshot().Refusals)
	}
}
