package target

import (
	"bytes"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// faulty returns a rig with a namespace, and an admin and an I/O queue.
func faulty(t *testing.T) (*rig, *hostQueue, *hostQueue) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	return r, a, r.io(a, 1, 32)
}

func TestFaultStatus(t *testing.T) {
	r, a, h := faulty(t)
	other := r.io(a, 2, 32)
	f := r.target.Faults()
	var cmd nvme.Command
	cmd.SetFlush(1)
	added := f.Add(Fault{Match: Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpFlush}}, Skip: 1, Count: 2, Status: nvme.StatusUnrecoveredRead | dnr})
	f.Add(Fault{Match: Match{NSID: 9}, Status: nvme.StatusInternal})
	f.Add(Fault{Match: Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminKeepAlive}}, Status: nvme.StatusInternal})
	h.want(0, &cmd)
	h.want(nvme.StatusUnrecoveredRead|dnr, &cmd)
	other.want(0, &cmd)
	if added.UsedUp() {
		t.Error("used up after one of two commands")
	}
	h.want(nvme.StatusUnrecoveredRead|dnr, &cmd)
	if !added.UsedUp() {
		t.Error("not used up after two commands")
	}
	h.want(0, &cmd)
	cmd.SetFlush(9)
	h.want(nvme.StatusInternal, &cmd)
	added.Remove()
	h.want(nvme.StatusInternal, &cmd)
	a.property(nvme.PropCSTS, false)
	cmd.SetKeepAlive()
	a.want(nvme.StatusInternal, &cmd)
	f.Clear()
	a.want(0, &cmd)
	if f.rules.Load() != nil {
		t.Error("rules are left")
	}
}

func TestFaultDropAndDelay(t *testing.T) {
	r, _, h := faulty(t)
	f := r.target.Faults()
	f.Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpWriteZeroes}}, Drop: true})
	f.Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpRead}}, Delay: 500 * time.Millisecond, Status: nvme.StatusNamespaceNotReady, Count: 1})
	f.Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpRead}}, Delay: 500 * time.Millisecond})
	var cmd nvme.Command
	for range 20 { // dropped commands free their buffers and completions
		cmd.SetWriteZeroes(1, 0, 1, false, false)
		cmd.SetCID(1)
		h.send(&cmd, nil)
		cmd.SetFlush(1)
		h.want(0, &cmd)
	}
	start := time.Now()
	for cid := range uint16(2) {
		cmd.SetRead(1, 0, 8, false)
		cmd.SetCID(1000 + cid)
		h.send(h.keyed(&cmd, 4096), nil)
	}
	cmd.SetFlush(1)
	h.want(0, &cmd) // overtakes the delayed commands
	for range 2 {
		if !h.await() {
			t.Fatal("connection ended")
		}
		want := nvme.StatusSuccess
		if h.response.CID() == 1000 {
			want = nvme.StatusNamespaceNotReady
		}
		if h.response.Status() != want {
			t.Errorf("response %v", &h.response)
		}
	}
	if d := time.Since(start); d < 500*time.Millisecond {
		t.Errorf("answered after %v", d)
	}
}

func TestFaultStall(t *testing.T) {
	r, _, h := faulty(t)
	f := r.target.Faults()
	f.Stall(true)
	var cmd nvme.Command
	cmd.SetFlush(1)
	cmd.SetCID(3)
	h.send(&cmd, nil)
	free := r.mustDial(0, adminDepth) // connections can still be made
	if n, err := h.cq.Poll(h.wcs[:]); n == 1 && h.wcs[0].Recv || err != nil {
		t.Errorf("a stalled target answered: %v", err)
	}
	f.Stall(false)
	if !h.await() || h.response.CID() != 3 {
		t.Errorf("response %v", &h.response)
	}
	f.FailConnects(nvme.StatusConnectControllerBusy)
	connect, _ := free.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	free.want(nvme.StatusConnectControllerBusy, connect)
	f.Clear()
	free.want(0, connect)
}

func TestFaultDisconnect(t *testing.T) {
	r, a, h := faulty(t)
	f := r.target.Faults()
	f.Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpFlush}}, Disconnect: true})
	var cmd nvme.Command
	cmd.SetFlush(1)
	h.send(&cmd, nil)
	if h.await() {
		t.Errorf("response %v", &h.response)
	}
	a.property(nvme.PropCSTS, false)
	if n := f.Disconnect(0); n != 1 {
		t.Errorf("%d admin queues were disconnected", n)
	}
	if a.await() {
		t.Errorf("response %v", &a.response)
	}
	last := r.admin(testNQN)
	if n := f.Disconnect(-1); n < 1 || last.await() {
		t.Errorf("%d queues were disconnected", n)
	}
}

func TestFaultCorrupt(t *testing.T) {
	r, _, h := faulty(t)
	f := r.target.Faults()
	var cmd nvme.Command
	once := func(c Corruption, check func()) {
		t.Helper()
		f.Add(Fault{Count: 1, Corrupt: c})
		cmd.SetRead(1, 0, 8, false)
		cmd.SetCID(77)
		h.send(h.keyed(&cmd, 4096), nil)
		if !h.await() {
			t.Fatalf("%v: connection ended", c)
		}
		check()
		f.Clear()
		cmd.SetFlush(1)
		h.want(0, &cmd)
	}
	once(CorruptID, func() {
		if h.response.CID() == 77 {
			t.Error("the id is right")
		}
	})
	once(CorruptDuplicate, func() {
		if h.response.CID() != 77 || !h.await() || h.response.CID() != 77 {
			t.Errorf("response %v", &h.response)
		}
	})
	once(CorruptShort, func() {
		if h.bytes != 8 {
			t.Errorf("response of %d bytes", h.bytes)
		}
	})
	once(CorruptSQHead, func() {
		if h.response.SQHead() < 32 {
			t.Errorf("head %d", h.response.SQHead())
		}
	})
	once(CorruptData, func() {
		if h.response.CID() != 77 || !h.response.Status().OK() || bytes.Equal(h.data.Bytes()[:4096], make([]byte, 4096)) {
			t.Errorf("response %v, and data as it is on the disk", &h.response)
		}
	})
	// Like an adapter, the fabric breaks the connection after a wrong key.
	f.Add(Fault{Corrupt: CorruptKey})
	h.send(&cmd, nil)
	if h.await() {
		t.Errorf("response %v", &h.response)
	}
}

// TestFaultSelector selects commands by the low byte of CDW10. A command whose reply is
// lost is executed.
func TestFaultSelector(t *testing.T) {
	r, a, _ := faulty(t)
	f := r.target.Faults()
	f.Add(Fault{Match: Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminIdentify}, Selectors: []uint8{nvme.CNSNamespaceDescriptors}}, Status: nvme.StatusInvalidField | dnr})
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSNamespaceDescriptors, 1, 0)
	a.want(nvme.StatusInvalidField|dnr, a.keyed(&cmd, nvme.IdentifySize))
	a.identify(nvme.CNSNamespace, 1)
	f.Clear()
	a.identify(nvme.CNSNamespaceDescriptors, 1)

	f.Add(Fault{Match: Match{Admin: true, Selectors: []uint8{nvme.CNSController}}, Patches: []Patch{
		{1792, []byte{255, 255, 255, 255}}, {4095, []byte{1, 2}}, {4096, []byte{1}}, {1 << 40, []byte{1}}, {-1, []byte{1}},
	}})
	if id := nvme.IdentifyControllerAt(a.identify(nvme.CNSController, 0)); id.IOCCSZ() != 1<<32-1 || id[4095] != 1 {
		t.Errorf("IOCCSZ %#x", id.IOCCSZ())
	}
	f.Clear()

	if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 2, Store: NewRAM(1 << 20)}); err != nil {
		t.Fatal(err)
	}
	f.Add(Fault{Match: Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminGetLogPage}, Selectors: []uint8{nvme.LogChangedNamespaces}}, Count: 1, Corrupt: CorruptLost})
	a.data.Bytes()[0] = 0xEE
	cmd.SetGetLogPage(nvme.LogChangedNamespaces, 0, nvme.IdentifySize, 0, false)
	cmd.SetCID(7)
	a.send(a.keyed(&cmd, nvme.IdentifySize), nil)
	cmd.SetKeepAlive()
	a.want(0, &cmd) // the first response, because the reply before it is lost
	if a.data.Bytes()[0] != 0xEE {
		t.Error("the data of a lost reply arrived")
	}
	if ids, _ := nvme.ChangedNSListAt(a.log(nvme.LogChangedNamespaces, nvme.IdentifySize)).NSIDs(); len(ids) != 0 {
		t.Errorf("changed namespaces %v, which were told before", ids)
	}
}

// TestFaultHold: a held write is executed after its connections and its controller have
// ended, but not if the target closes.
func TestFaultHold(t *testing.T) {
	for _, c := range []struct {
		name string
		hold time.Duration
		want byte
	}{{"lands", 200 * time.Millisecond, 1}, {"target closes", time.Hour, 0}} {
		t.Run(c.name, func(t *testing.T) {
			r, ram, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
			a := r.admin(testNQN)
			h := r.io(a, 1, 32)
			r.target.Faults().Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: c.hold})
			var cmd nvme.Command
			cmd.SetWrite(1, 0, 8, false)
			cmd.SetInCapsuleSGL(0, 4096)
			h.send(&cmd, bytes.Repeat([]byte{1}, 4096))
			for r.target.Snapshot().IO.Commands[nvme.OpWrite] == 0 {
				time.Sleep(time.Millisecond)
			}
			for _, q := range []*hostQueue{h, a} {
				if err := q.id.Disconnect(); err != nil {
					t.Error(err)
				}
			}
			if !r.known(testNQN, a.cntlid) {
				t.Error("the controller is unknown while its write is held")
			}
			if c.want == 0 {
				if err := r.target.Close(); err != nil {
					t.Error(err)
				}
			} else {
				for deadline := time.Now().Add(patience); r.known(testNQN, a.cntlid); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatal("the controller is still known")
					}
				}
			}
			var got [1]byte
			if _, err := ram.ReadAt(got[:], 0); err != nil || got[0] != c.want {
				t.Errorf("the disk has %d, want %d; %v", got[0], c.want, err)
			}
		})
	}
}

// TestFaultFreeze: a frozen target does nothing and ends nothing. After that it
// executes the commands that have arrived.
func TestFaultFreeze(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	h := r.io(a, 1, 32)
	c := r.target.controllers.find(a.cntlid, testNQN)
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureKeepAlive, 100)
	a.want(0, &cmd)
	f := r.target.Faults()
	f.Freeze(time.Hour)
	cmd.SetWrite(1, 0, 8, false)
	cmd.SetInCapsuleSGL(0, 4096)
	cmd.SetCID(5)
	h.send(&cmd, bytes.Repeat([]byte{1}, 4096))
	for range 5 { // keep alive periods
		time.Sleep(100 * time.Millisecond)
		c.expire()
	}
	if n, err := h.cq.Poll(h.wcs[:]); n == 1 && h.wcs[0].Recv || err != nil {
		t.Errorf("a frozen target answered: %v", err)
	}
	// The host disconnects. The target notices that only after the freeze.
	if err := h.id.Disconnect(); err != nil {
		t.Error(err)
	}
	time.Sleep(2 * afterThaw)
	if r.target.controllers.find(a.cntlid, testNQN) == nil || !f.Frozen() {
		t.Error("a frozen target ended a controller")
	}
	f.Freeze(10 * time.Millisecond)
	a.property(nvme.PropCSTS, false)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		var got [1]byte
		if _, err := ram.ReadAt(got[:], 0); err != nil || got[0] == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("what had arrived was not carried out")
		}
	}
	r.admin(testNQN)
}

// TestCloseFrozen: a target can be closed while it is frozen.
func TestCloseFrozen(t *testing.T) {
	r, _, h := faulty(t)
	r.target.Faults().Freeze(time.Hour)
	var cmd nvme.Command
	cmd.SetFlush(1)
	h.send(&cmd, nil)
	if err := r.target.Close(); err != nil {
		t.Error(err)
	}
	if h.await() {
		t.Errorf("response %v", &h.response)
	}
}

// TestHiddenNamespaces: a target opens its port before it adds its namespaces.
func TestHiddenNamespaces(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	f := r.target.Faults()
	f.HideNamespaces(time.Hour)
	if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 2, Store: NewRAM(1 << 20)}); err != nil {
		t.Fatal(err)
	}
	a := r.admin(testNQN)
	h := r.io(a, 1, 32)
	a.arm(9)
	list := func() int {
		t.Helper()
		ids, err := nvme.ActiveNSListAt(a.identify(nvme.CNSActiveNSList, 0)).NSIDs()
		if err != nil {
			t.Fatal(err)
		}
		return len(ids)
	}
	if n := list(); n != 0 {
		t.Errorf("%d namespaces are listed", n)
	}
	var cmd nvme.Command
	cmd.SetFlush(2)
	h.want(nvme.StatusInvalidNamespace|dnr, &cmd)
	f.HideNamespaces(time.Millisecond)
	a.event(9, nvme.NoticeNamespaceChanged)
	if n := list(); n != 1 {
		t.Errorf("%d namespaces are listed", n)
	}
	h.want(0, &cmd)
	f.HideNamespaces(time.Hour)
	f.Clear()
	if f.Hidden() || list() != 1 {
		t.Error("namespaces are hidden")
	}
}

// TestAnnounced: Identify Controller announces what the configuration says, and the
// target acts accordingly.
func TestAnnounced(t *testing.T) {
	r, _, _ := newDisk(t, Config{
		QuiesceTime: 1500 * time.Millisecond, ANATransition: 2 * time.Second, CommandKeepAlive: true, NoWriteCache: true,
		RetryDelays: [3]time.Duration{100 * time.Millisecond, 0, 6553500 * time.Millisecond},
	}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	id := nvme.IdentifyControllerAt(a.identify(nvme.CNSController, 0))
	if id.CQT() != 1500 || id.ANATT() != 2 || id.TBKAS() || id.VWC() != 0 || id.CRDT(1) != 1 || id.CRDT(2) != 0 || id.CRDT(3) != 65535 {
		t.Errorf("cqt %d, tbkas %t, vwc %d, crdt %d %d %d", id.CQT(), id.TBKAS(), id.VWC(), id.CRDT1(), id.CRDT2(), id.CRDT3())
	}
	r.target.Faults().Add(Fault{Match: Match{Opcodes: []nvme.Opcode{nvme.OpFlush}}, Count: 1, Status: nvme.StatusNamespaceNotReady | 3<<11})
	h := r.io(a, 1, 32)
	var cmd nvme.Command
	cmd.SetFlush(1)
	if s := h.do(&cmd, nil).Status(); s.CRD() != 3 || s.Code() != nvme.StatusNamespaceNotReady {
		t.Errorf("status %v, delay %d", s, s.CRD())
	}
	cmd.SetSetFeatures(nvme.FeatureVolatileWriteCache, 1)
	a.want(nvme.StatusInvalidField|dnr, &cmd)
	// I/O does not keep the controller alive.
	c := r.target.controllers.find(a.cntlid, testNQN)
	cmd.SetSetFeatures(nvme.FeatureKeepAlive, 600_000)
	a.want(0, &cmd)
	cmd.SetKeepAlive()
	a.want(0, &cmd)
	c.expire()
	cmd.SetFlush(1)
	h.want(0, &cmd)
	c.expire()
	if a.await() {
		t.Errorf("response %v", &a.response)
	}

	other, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	id = nvme.IdentifyControllerAt(other.admin(testNQN).identify(nvme.CNSController, 0))
	if id.CQT() != 0 || !id.TBKAS() || id.VWC() != nvme.VWCPresent {
		t.Errorf("by default: cqt %d, tbkas %t, vwc %d", id.CQT(), id.TBKAS(), id.VWC())
	}
}
