package target

import (
	"testing"

	"ublk-nvmeof/nvme"
)

// arm sends an asynchronous event request with this id.
func (h *hostQueue) arm(cid uint16) {
	var cmd nvme.Command
	cmd.SetAsyncEvent()
	cmd.SetCID(cid)
	h.send(&cmd, nil)
}

// event waits for an event.
func (h *hostQueue) event(cid uint16, info uint8) {
	h.t.Helper()
	if !h.await() {
		h.t.Fatal("connection ended")
	}
	if e := nvme.AsyncEvent(h.response.DW0()); h.response.CID() != cid || !h.response.Status().OK() || e.Type() != nvme.EventNotice || e.Info() != info {
		h.t.Fatalf("response %v is no event %02xh", &h.response, info)
	}
}

func TestEvents(t *testing.T) {
	r, ram, ns := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	h := r.admin(testNQN)
	for cid := range uint16(aerLimit) {
		h.arm(cid)
	}
	h.arm(99)
	if !h.await() || h.response.CID() != 99 || h.response.Status() != nvme.StatusAsyncEventLimitExceeded|dnr {
		t.Fatalf("response %v", &h.response)
	}
	changed := func(want ...uint32) {
		t.Helper()
		ids, overflow := nvme.ChangedNSListAt(h.log(nvme.LogChangedNamespaces, nvme.IdentifySize)).NSIDs()
		if overflow || len(ids) != len(want) {
			t.Fatalf("changed %v, want %v", ids, want)
		}
		for i := range ids {
			if ids[i] != want[i] {
				t.Fatalf("changed %v, want %v", ids, want)
			}
		}
	}
	if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 5, Store: NewRAM(4096)}); err != nil {
		t.Fatal(err)
	}
	h.event(0, nvme.NoticeNamespaceChanged)
	if err := ram.Resize(2 << 20); err != nil {
		t.Fatal(err)
	}
	ns.Revalidate() // no event before the log is read, but an entry in the log
	ns.Revalidate()
	changed(5, 1)
	changed()
	if n := nvme.IdentifyNamespaceAt(h.identify(nvme.CNSNamespace, 1)).NSZE(); n != 4096 {
		t.Errorf("%d blocks after the resize", n)
	}
	if err := r.subsys.RemoveNamespace(5); err != nil {
		t.Fatal(err)
	}
	h.event(1, nvme.NoticeNamespaceChanged)
	changed(5)
	if _, err := r.subsys.ReplaceNamespace(NamespaceConfig{NSID: 1, Store: NewRAM(4096), BlockSize: 4096, ANAGroup: 7}); err != nil {
		t.Fatal(err)
	}
	h.event(2, nvme.NoticeNamespaceChanged)
	changed(1)

	if err := r.subsys.SetANAState(7, nvme.ANANonOptimized); err != nil {
		t.Fatal(err)
	}
	h.event(3, nvme.NoticeANAChanged)
	log, err := nvme.ParseANALog(h.log(nvme.LogANA, 128))
	if err != nil || log.NumGroups() != 1 || log.ChangeCount() != 1 {
		t.Fatalf("ana log of %d groups, change %d: %v", log.NumGroups(), log.ChangeCount(), err)
	}
	for g := range log.Groups() {
		if g.ID != 7 || g.State != nvme.ANANonOptimized || g.NumNSIDs() != 1 {
			t.Errorf("ana group %+v", g)
		}
	}
	// An event waits for an asynchronous event request. An event that the host has
	// disabled does not.
	if err := r.subsys.SetANAState(7, nvme.ANAOptimized); err != nil {
		t.Fatal(err)
	}
	h.arm(4)
	h.event(4, nvme.NoticeANAChanged)
	h.log(nvme.LogANA, 128)
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureAsyncEvent, nvme.AENNamespaceAttribute)
	h.want(0, &cmd)
	if err := r.subsys.SetANAState(7, nvme.ANAInaccessible); err != nil {
		t.Fatal(err)
	}
	h.arm(5)
	ns, err = r.subsys.AddNamespace(NamespaceConfig{Store: NewRAM(4096)})
	if err != nil || ns.NSID() != 2 {
		t.Fatalf("namespace %v %v", ns, err)
	}
	h.event(5, nvme.NoticeNamespaceChanged)
}

func TestLogPages(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	io := r.io(a, 1, 32)
	var cmd nvme.Command
	cmd.SetRead(1, 0, 1, false)
	for range 3 {
		io.want(0, io.keyed(&cmd, 512))
	}
	if s := nvme.SMARTLogAt(a.log(nvme.LogSMART, nvme.SMARTLogSize)); s.HostReads() != 3 || s.HostWrites() != 0 || s.DataUnitsRead() != 1 {
		t.Errorf("%d reads, %d writes, %d units read", s.HostReads(), s.HostWrites(), s.DataUnitsRead())
	}
	if e := nvme.ErrorLogEntryAt(a.log(nvme.LogError, 64)); e.ErrorCount() != 0 {
		t.Error("the error log has an entry")
	}
	for _, bad := range []struct {
		lid         uint8
		length, sgl int
		offset      uint64
		status      nvme.Status
	}{
		{nvme.LogSMART, 512, 1024, 0, nvme.StatusInvalidSGLDataLength},
		{nvme.LogSMART, 512, 512, 516, nvme.StatusInvalidField},
		{nvme.LogSMART, 512, 512, 1 << 63, nvme.StatusInvalidField},
		{nvme.LogANA, 512, 512, 1<<64 - 4, nvme.StatusInvalidField},
		{nvme.LogChangedNamespaces, 4096, 4096, 1<<64 - 4096, nvme.StatusInvalidField},
		{nvme.LogDiscovery, 512, 512, 0, nvme.StatusInvalidField},
		{0x55, 512, 512, 0, nvme.StatusInvalidField},
	} {
		cmd.SetGetLogPage(bad.lid, 0, uint32(bad.length), bad.offset, false)
		a.want(bad.status|dnr, a.keyed(&cmd, bad.sgl))
	}
	cmd.SetGetLogPage(nvme.LogSMART, 0, 512, 512, false)
	a.want(0, a.keyed(&cmd, 512)) // zeroes at the end
}

// TestErrorLog: the log has the last commands that failed, the newest first, and the
// health log counts all of them.
func TestErrorLog(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	io := r.io(a, 1, 32)
	var cmd nvme.Command
	cmd.SetRead(1, 1<<40, 1, false)
	io.want(nvme.StatusLBAOutOfRange|dnr, io.keyed(&cmd, 512))
	cmd.SetFlush(77)
	io.want(nvme.StatusInvalidNamespace|dnr, &cmd)
	cmd.SetGetFeatures(0xC5)
	a.want(nvme.StatusInvalidField|dnr, &cmd)
	entry := func(i int) nvme.ErrorLogEntry {
		return *nvme.ErrorLogEntryAt(a.log(nvme.LogError, errorEntries*nvme.ErrorLogEntrySize)[i*nvme.ErrorLogEntrySize:])
	}
	for i, want := range []struct {
		count  uint64
		sqid   uint16
		status nvme.Status
		op     nvme.Opcode
		nsid   uint32
		lba    uint64
	}{
		{3, 0, nvme.StatusInvalidField | dnr, nvme.AdminGetFeatures, 0, 0},
		{2, 1, nvme.StatusInvalidNamespace | dnr, nvme.OpFlush, 77, 0},
		{1, 1, nvme.StatusLBAOutOfRange | dnr, nvme.OpRead, 1, 1 << 40},
		{},
	} {
		e := entry(i)
		if e.ErrorCount() != want.count || e.SQID() != want.sqid || e.Status() != want.status || e.Opcode() != want.op || e.NSID() != want.nsid || e.LBA() != want.lba {
			t.Errorf("entry %d: error %d of queue %d, %v, opcode %v, namespace %d, block %d", i, e.ErrorCount(), e.SQID(), e.Status(), e.Opcode(), e.NSID(), e.LBA())
		}
	}
	cmd.SetGetFeatures(0xC5)
	for range errorEntries {
		a.want(nvme.StatusInvalidField|dnr, &cmd)
	}
	if first, last := entry(0), entry(errorEntries-1); first.ErrorCount() != errorEntries+3 || last.ErrorCount() != 4 {
		t.Errorf("after %d more: errors %d to %d", errorEntries, first.ErrorCount(), last.ErrorCount())
	}
	if s := nvme.SMARTLogAt(a.log(nvme.LogSMART, nvme.SMARTLogSize)); s.ErrorLogEntries() != errorEntries+3 {
		t.Errorf("the health log counts %d", s.ErrorLogEntries())
	}
	other := r.admin(testNQN)
	if e := nvme.ErrorLogEntryAt(other.log(nvme.LogError, 64)); e.ErrorCount() != 0 {
		t.Error("another controller has the errors")
	}
}

// TestKeepAlive lets a controller expire whose host is silent.
func TestKeepAlive(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	silent, other := r.admin(testNQN), r.admin(testNQN)
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureKeepAlive, 20)
	silent.want(0, &cmd)
	if silent.await() {
		t.Errorf("response %v", &silent.response)
	}
	// A controller without a timeout lives on, and so does one with a command in
	// each period.
	c := r.target.controllers.find(other.cntlid, testNQN)
	c.expire()
	cmd.SetSetFeatures(nvme.FeatureKeepAlive, 600_000)
	other.want(0, &cmd)
	cmd.SetKeepAlive()
	for range 3 {
		other.want(0, &cmd)
		c.expire()
	}
	r.target.Faults().Stall(true)
	c.expire()
	r.target.Faults().Stall(false)
	other.want(0, &cmd)
	c.expire()
	c.expire()
	if other.await() {
		t.Errorf("response %v", &other.response)
	}
}

// TestAdminEndsController: all queues of a controller end with its admin queue.
func TestAdminEndsController(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	io := r.io(a, 1, 32)
	if err := a.id.Disconnect(); err != nil {
		t.Fatal(err)
	}
	if io.await() {
		t.Errorf("response %v", &io.response)
	}
	b := r.admin(testNQN)
	r.subsys.DropControllers()
	if b.await() {
		t.Errorf("response %v", &b.response)
	}
}
