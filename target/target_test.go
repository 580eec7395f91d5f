package target

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

func TestConnectRefusals(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{AllowHosts: []string{"nqn.2026-01.org.example:other", hostNQN}})
	h := r.mustDial(0, adminDepth)
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	h.want(nvme.StatusInvalidOpcode|dnr, h.keyed(&cmd, nvme.IdentifySize))

	for _, c := range []struct {
		name   string
		change func(*nvme.Command, *nvme.ConnectData)
		status nvme.Status
		offset uint16
		inData bool
	}{
		{"record format", func(c *nvme.Command, _ *nvme.ConnectData) { c[40] = 1 }, nvme.StatusConnectIncompatibleFormat, 40, false},
		{"queue id", func(c *nvme.Command, _ *nvme.ConnectData) { c[42] = 1 }, nvme.StatusConnectInvalidParam, 42, false},
		{"queue size 0", func(c *nvme.Command, _ *nvme.ConnectData) { c[44] = 0 }, nvme.StatusConnectInvalidParam, 44, false},
		{"queue size", func(c *nvme.Command, _ *nvme.ConnectData) { c[44] = 32 }, nvme.StatusConnectInvalidParam, 44, false},
		{"controller id", func(_ *nvme.Command, d *nvme.ConnectData) { d.SetCNTLID(1) }, nvme.StatusConnectInvalidParam, 16, true},
		{"subsystem", func(_ *nvme.Command, d *nvme.ConnectData) { d[260] ^= 1 }, nvme.StatusConnectInvalidParam, 256, true},
		{"no host", func(_ *nvme.Command, d *nvme.ConnectData) { d[512] = 0 }, nvme.StatusConnectInvalidParam, 512, true},
		{"host not allowed", func(_ *nvme.Command, d *nvme.ConnectData) { d[520] ^= 1 }, nvme.StatusConnectInvalidHost, 512, true},
	} {
		cmd, data := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
		c.change(cmd, data)
		done := h.want(c.status|dnr, cmd)
		if p := nvme.ConnectInvalidParam(done.DW0()); p.Offset() != c.offset || p.InData() != c.inData {
			t.Errorf("%s: offset %d in data %t", c.name, p.Offset(), p.InData())
		}
	}
	short, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	h.want(nvme.StatusInvalidSGLDataLength|dnr, h.keyed(short, 512))

	good, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	id := nvme.ConnectResult(h.want(0, good).DW0()).CNTLID()
	h.want(nvme.StatusInvalidOpcode|dnr, good) // a second Connect command
	h.want(nvme.StatusCommandSequence|dnr, h.keyed(&cmd, nvme.IdentifySize))

	io := r.mustDial(1, 32)
	try := func(q *hostQueue, s nvme.Status, qid, cntlid uint16) {
		t.Helper()
		cmd, _ := q.connectCommand(testNQN, qid, cntlid, 0)
		q.want(s, cmd)
	}
	try(io, nvme.StatusCommandSequence|dnr, 1, id) // not enabled
	h.setCC(nvme.NewCC(nvme.CCSelectNVM).WithEN(true))
	try(io, nvme.StatusConnectInvalidParam|dnr, 1, id+1)
	try(io, 0, 1, id)
	try(r.mustDial(1, 32), nvme.StatusCommandSequence|dnr, 1, id) // a second queue 1
	try(r.mustDial(DefaultMaxQueues+1, 32), nvme.StatusConnectInvalidParam|dnr, DefaultMaxQueues+1, id)
}

func TestRejects(t *testing.T) {
	r := newRig(t, Config{MaxConnections: 2, QueueSize: 32}, SubsystemConfig{})
	want := func(qid uint16, entries int, status nvme.RDMARejectStatus) {
		t.Helper()
		_, err := r.dial(qid, entries)
		var reject *rdma.RejectError
		if !errors.As(err, &reject) {
			t.Fatalf("queue %d of %d: %v", qid, entries, err)
		}
		if got, err := nvme.ParseRDMAReject(reject.Private); err != nil || got.Status != status {
			t.Errorf("queue %d of %d: %v %v, want %v", qid, entries, got.Status, err, status)
		}
	}
	want(0, adminDepth+1, nvme.RDMARejectInvalidHSQSize)
	want(1, 33, nvme.RDMARejectInvalidHSQSize)
	r.target.Faults().RejectConnects(nvme.RDMARejectInvalidCNTLID)
	want(0, adminDepth, nvme.RDMARejectInvalidCNTLID)
	r.target.Faults().Clear()
	r.mustDial(0, adminDepth)
	r.mustDial(0, adminDepth)
	want(0, adminDepth, nvme.RDMARejectNoResources)
	if s := r.target.Snapshot(); s.Connections != 2 || s.Connects != 2 || s.Rejects != 4 {
		t.Errorf("%d connections, %d connects, %d rejects", s.Connections, s.Connects, s.Rejects)
	}
}

func TestProperties(t *testing.T) {
	r := newRig(t, Config{QueueSize: 64}, SubsystemConfig{})
	h := r.mustDial(0, adminDepth)
	cmd, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, 0)
	h.want(0, cmd)
	c := nvme.Cap(h.property(nvme.PropCAP, true))
	if c.MQES() != 63 || c.TO() == 0 || !c.CQR() || c.CSS() != nvme.CSSNVM|nvme.CSSIOSets || !c.CRWMS() || c.MPSMIN() != 0 {
		t.Errorf("CAP %x", uint64(c))
	}
	if v := nvme.Version(h.property(nvme.PropVS, false)); v != nvme.NewVersion(2, 1, 0) {
		t.Errorf("version %v", v)
	}
	if w := nvme.CRTO(h.property(nvme.PropCRTO, false)).CRWMT(); w == 0 {
		t.Error("no ready timeout")
	}
	status := func(want nvme.CSTS) {
		t.Helper()
		if s := nvme.CSTS(h.property(nvme.PropCSTS, false)); s != want {
			t.Errorf("status %v, want %v", s, want)
		}
	}
	cc := nvme.NewCC(nvme.CCSelectNVM)
	status(0)
	h.setCC(cc.WithEN(true))
	status(nvme.NewCSTS(true, false, 0))
	if got := nvme.CC(h.property(nvme.PropCC, false)); got != cc.WithEN(true) {
		t.Errorf("CC %x", got)
	}
	h.setCC(0)
	status(0)
	h.setCC(cc.WithEN(true) | 1<<7) // 8 KiB pages
	status(nvme.NewCSTS(false, true, 0))
	h.setCC(0)
	h.setCC(cc.WithEN(true))
	h.setCC(cc.WithEN(true).WithSHN(nvme.ShutdownNormal))
	h.untilStatus(nvme.NewCSTS(false, false, nvme.ShutdownStatusComplete))

	for _, bad := range []func(*nvme.Command){
		func(c *nvme.Command) { c.SetPropertyGet(nvme.PropCAP, false) },
		func(c *nvme.Command) { c.SetPropertyGet(nvme.PropCC, true) },
		func(c *nvme.Command) { c.SetPropertyGet(nvme.PropNSSR, false) },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCSTS, 0, false) },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 0, true) },
	} {
		var cmd nvme.Command
		bad(&cmd)
		h.want(nvme.StatusInvalidField|dnr, &cmd)
	}
}

func TestIdentify(t *testing.T) {
	r := newRig(t, Config{InCapsule: 8192, MaxTransfer: 128 << 10}, SubsystemConfig{Serial: "S1", Model: "M1"})
	guid := [16]byte{9, 8, 7}
	uuid := nvme.NewUUID()
	for _, cfg := range []NamespaceConfig{{NSID: 3, BlockSize: 4096, UUID: uuid, NGUID: guid, ANAGroup: 2, ReadOnly: true}, {}, {NSID: 7}} {
		cfg.Store = NewRAM(1 << 20)
		if _, err := r.subsys.AddNamespace(cfg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 3, Store: NewRAM(4096)}); err == nil {
		t.Error("namespace 3 was added twice")
	}
	h := r.admin(testNQN)
	id := nvme.IdentifyControllerAt(h.identify(nvme.CNSController, 0))
	if id.SN() != "S1" || id.MN() != "M1" || id.SUBNQN() != testNQN || id.CNTLID() != h.cntlid || id.IOCCSZ() != (64+8192)/16 ||
		id.SGLS()&nvme.SGLSOffset == 0 || 4096<<id.MDTS() != 128<<10 || id.CNTRLTYPE() != nvme.ControllerTypeIO || id.AERL() != 3 || id.KAS() != 10 {
		t.Errorf("controller %q %q %q %d", id.SN(), id.MN(), id.SUBNQN(), id.CNTLID())
	}
	ids, err := nvme.ActiveNSListAt(h.identify(nvme.CNSActiveNSList, 1)).NSIDs()
	if err != nil || len(ids) != 2 || ids[0] != 3 || ids[1] != 7 {
		t.Errorf("namespaces above 1: %v %v", ids, err)
	}
	ns := nvme.IdentifyNamespaceAt(h.identify(nvme.CNSNamespace, 3))
	if ns.NSZE() != 256 || ns.Format().LBADS != 12 || !ns.WriteProtected() || ns.ANAGRPID() != 2 || ns.NGUID() != guid || ns.DeallocatedRead() != nvme.DLFEATZeroes {
		t.Errorf("namespace: %d blocks of 2^%d", ns.NSZE(), ns.Format().LBADS)
	}
	if page := h.identify(nvme.CNSNamespace, 5); !bytes.Equal(page, make([]byte, 4096)) {
		t.Error("an inactive namespace has properties")
	}
	names, err := nvme.ParseNamespaceDescriptors(h.identify(nvme.CNSNamespaceDescriptors, 3))
	if err != nil || names.UUID != uuid || names.NGUID != guid || !names.HasCSI {
		t.Errorf("descriptors %+v %v", names, err)
	}
	if i := nvme.IdentifyNSIndependentAt(h.identify(nvme.CNSNSIndependent, 3)); i.NSTAT() != nsReady || !i.WriteProtected() {
		t.Error("command set independent structure is wrong")
	}
	var unprotect nvme.Command
	unprotect.SetSetFeatures(nvme.FeatureWriteProtect, writeProtectNone)
	unprotect.SetNSID(3)
	h.want(nvme.StatusFeatureNotChangeable|dnr, &unprotect) // the configuration makes it read-only
	h.identify(nvme.CNSControllerCSI, 0)
	h.identify(nvme.CNSNamespaceCSI, 3)
	var cmd nvme.Command
	for s, set := range map[nvme.Status][2]uint32{nvme.StatusInvalidNamespace: {nvme.CNSNamespaceDescriptors, 5}, nvme.StatusInvalidField: {0x77, 0}} {
		cmd.SetIdentify(uint8(set[0]), set[1], 0)
		h.want(s|dnr, h.keyed(&cmd, 4096))
	}
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	h.want(nvme.StatusInvalidSGLDataLength|dnr, h.keyed(&cmd, 2048))
}

func TestFeatures(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	h := r.admin(testNQN)
	set := func(s nvme.Status, fid uint8, nsid, v uint32) uint32 {
		t.Helper()
		var cmd nvme.Command
		cmd.SetSetFeatures(fid, v)
		cmd.SetNSID(nsid)
		return h.want(s, &cmd).DW0()
	}
	get := func(fid uint8, nsid uint32) uint32 {
		t.Helper()
		var cmd nvme.Command
		cmd.SetGetFeatures(fid)
		cmd.SetNSID(nsid)
		return h.want(0, &cmd).DW0()
	}
	grant := func(want int) {
		t.Helper()
		if got := nvme.GrantedQueues(set(0, nvme.FeatureNumberOfQueues, 0, nvme.NumberOfQueues(8))); got != want {
			t.Errorf("%d queues granted, want %d", got, want)
		}
	}
	grant(DefaultMaxQueues)
	if err := r.subsys.SetMaxQueues(3); err != nil {
		t.Fatal(err)
	}
	grant(3)
	r.target.Faults().Grant(2)
	grant(2)
	r.target.Faults().Grant(-1)
	set(nvme.StatusInternal, nvme.FeatureNumberOfQueues, 0, nvme.NumberOfQueues(8))
	r.target.Faults().Clear()
	if got := nvme.GrantedQueues(get(nvme.FeatureNumberOfQueues, 0)); got != 2 {
		t.Errorf("controller has %d queues", got)
	}
	set(0, nvme.FeatureAsyncEvent, 0, nvme.AENANAChange)
	if v := get(nvme.FeatureAsyncEvent, 0); v != nvme.AENANAChange {
		t.Errorf("events %x", v)
	}
	set(nvme.StatusInvalidField|dnr, nvme.FeatureAsyncEvent, 0, 1)
	set(0, nvme.FeatureKeepAlive, 0, 60000)
	if v := get(nvme.FeatureKeepAlive, 0); v != 60000 {
		t.Errorf("keep alive %d", v)
	}
	if v := get(nvme.FeatureVolatileWriteCache, 0); v != 1 {
		t.Errorf("write cache %d", v)
	}
	set(0, nvme.FeatureVolatileWriteCache, 0, 0)
	if v := get(nvme.FeatureVolatileWriteCache, 0); v != 0 {
		t.Errorf("write cache %d", v)
	}
	set(0, nvme.FeatureWriteProtect, 1, 1)
	if v := get(nvme.FeatureWriteProtect, 1); v != 1 {
		t.Errorf("write protect %d", v)
	}
	set(nvme.StatusFeatureNotChangeable|dnr, nvme.FeatureWriteProtect, 1, 3)
	set(nvme.StatusInvalidNamespace|dnr, nvme.FeatureWriteProtect, 2, 1)
	set(nvme.StatusInvalidField|dnr, nvme.FeatureArbitration, 0, 0)
	var cmd nvme.Command
	cmd.SetGetFeatures(nvme.FeatureHostID)
	cmd.SetCDW11(1)
	h.want(0, h.keyed(&cmd, 16))
	if nvme.UUID(h.data.Bytes()[:16]) != hostID {
		t.Errorf("host id %x", h.data.Bytes()[:16])
	}
	cmd.SetAbort(1, 5)
	if h.want(0, &cmd).DW0() != 1 {
		t.Error("a command was aborted")
	}
}

// TestSQFlowControl checks the submission queue head, with and without flow control.
func TestSQFlowControl(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a := r.admin(testNQN)
	h := r.io(a, 1, 4)
	var flush nvme.Command
	flush.SetFlush(1)
	for i := range 9 { // the Connect command was the first
		if got, want := h.want(0, &flush).SQHead(), uint16(i+2)%4; got != want {
			t.Fatalf("flush %d: head %d, want %d", i, got, want)
		}
	}
	off := r.mustDial(2, 4)
	cmd, _ := off.connectCommand(testNQN, 2, a.cntlid, 0)
	cmd[46] = nvme.ConnectDisableSQFlow
	if got := off.want(0, cmd).SQHead(); got != 0xFFFF {
		t.Errorf("head %#x", got)
	}
}

func TestDiscovery(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{AllowHosts: []string{hostNQN}})
	if _, err := r.target.AddSubsystem(SubsystemConfig{NQN: "nqn.2026-01.org.example:hidden", AllowHosts: []string{"x"}}); err != nil {
		t.Fatal(err)
	}
	h := r.admin(nvme.DiscoveryNQN)
	if id := nvme.IdentifyControllerAt(h.identify(nvme.CNSController, 0)); id.CNTRLTYPE() != nvme.ControllerTypeDiscovery || id.SUBNQN() != nvme.DiscoveryNQN {
		t.Errorf("controller type %d of %s", id.CNTRLTYPE(), id.SUBNQN())
	}
	var aer nvme.Command
	aer.SetAsyncEvent()
	aer.SetCID(7)
	h.send(&aer, nil)
	header, err := nvme.ParseDiscoveryHeader(h.log(nvme.LogDiscovery, nvme.DiscoveryHeaderSize))
	if err != nil || header.NumRec != 2 {
		t.Fatalf("%+v %v", header, err)
	}
	_, entries, err := nvme.ParseDiscoveryLog(h.log(nvme.LogDiscovery, nvme.DiscoveryHeaderSize+2*nvme.DiscoveryEntrySize))
	if err != nil {
		t.Fatal(err)
	}
	e := &entries[1]
	if entries[0].SUBTYPE() != nvme.SubsystemCurrentDiscovery || e.SUBNQN() != testNQN || e.TRADDR() != targetAddr.String() ||
		e.TRSVCID() != "4420" || e.TRTYPE() != nvme.TransportRDMA || e.ADRFAM() != nvme.AddressIPv4 || !e.TREQ().DisableSQFlow() {
		t.Errorf("entry %s %s:%s", e.SUBNQN(), e.TRADDR(), e.TRSVCID())
	}
	if err := r.target.RemoveSubsystem(testNQN); err != nil {
		t.Fatal(err)
	}
	if !h.await() || h.response.CID() != 7 || nvme.AsyncEvent(h.response.DW0()).Info() != nvme.NoticeDiscoveryChanged {
		t.Errorf("event %v", &h.response)
	}
	after, err := nvme.ParseDiscoveryHeader(h.log(nvme.LogDiscovery, nvme.DiscoveryHeaderSize))
	if err != nil || after.NumRec != 1 || after.GenCtr == header.GenCtr {
		t.Errorf("%+v after %+v", after, header)
	}
	io := r.mustDial(1, 32)
	cmd, _ := io.connectCommand(nvme.DiscoveryNQN, 1, h.cntlid, 0)
	io.want(nvme.StatusConnectInvalidParam|dnr, cmd)
	var flush nvme.Command
	flush.SetAbort(0, 1)
	h.want(nvme.StatusInvalidOpcode|dnr, &flush)
}

// TestConnectTimeout: a connection without a Connect command ends, and one with a
// Connect command does not.
func TestConnectTimeout(t *testing.T) {
	r := newRig(t, Config{ConnectTimeout: time.Second}, SubsystemConfig{})
	h := r.admin(testNQN)
	silent := r.mustDial(0, adminDepth)
	if silent.await() {
		t.Errorf("response %v", &silent.response)
	}
	h.property(nvme.PropCSTS, false) // it has been connected for longer than the other one was
	if n := r.target.Snapshot().Refusals["connection: no Connect command came"]; n != 1 {
		t.Errorf("%d connections are counted", n)
	}
}

func TestConfigErrors(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	for _, cfg := range []Config{
		{InCapsule: 100}, {InCapsule: 1 << 20}, {QueueSize: 8}, {QueueSize: 4096}, {MaxTransfer: 5000}, {MaxTransfer: 4096},
		{QuiesceTime: time.Minute + 6*time.Second}, {QuiesceTime: time.Microsecond}, {ANATransition: 256 * time.Second}, {ANATransition: time.Millisecond}, {MaxPerHost: -1}, {QueueMemory: -1}, {RetryDelays: [3]time.Duration{0, time.Millisecond}},
		{MaxTransfer: 2 << 20}, {MaxConnections: -1}, {ConnectTimeout: -1},
	} {
		if bad, err := New(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
			bad.Close()
		}
	}
	for _, cfg := range []SubsystemConfig{
		{}, {NQN: testNQN}, {NQN: nvme.DiscoveryNQN}, {NQN: "x", Serial: strings.Repeat("s", 21)},
		{NQN: "x", Model: strings.Repeat("m", 41)}, {NQN: "x", MaxQueues: -1}, {NQN: "x", Serial: "\x1b"}, {NQN: "x", Model: "é"}, {NQN: "x", AllowHosts: []string{""}},
	} {
		if _, err := r.target.AddSubsystem(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
	ram := NewRAM(4096)
	for _, cfg := range []NamespaceConfig{
		{}, {Store: ram, BlockSize: 1000}, {Store: ram, BlockSize: 8192}, {Store: ram, NSID: MaxNamespaces + 1},
		{Store: ram, ANAGroup: MaxANAGroups + 1},
	} {
		if _, err := r.subsys.AddNamespace(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
	for name, err := range map[string]error{
		"remove of no namespace": r.subsys.RemoveNamespace(1), "remove of no subsystem": r.target.RemoveSubsystem("x"),
		"0 queues": r.subsys.SetMaxQueues(0), "group 0": r.subsys.SetANAState(0, nvme.ANAOptimized), "state 9": r.subsys.SetANAState(1, 9),
	} {
		if err == nil {
			t.Errorf("%s succeeds", name)
		}
	}
	if _, err := r.subsys.ReplaceNamespace(NamespaceConfig{NSID: 4, Store: ram}); err == nil {
		t.Error("a namespace that is not there is replaced")
	}
}
