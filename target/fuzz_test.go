package target

import (
	"sync/atomic"
	"testing"

	"ublk-nvmeof/nvme"
)

// FuzzCapsule sends capsules with any content on an admin and an I/O queue. The target
// may answer or end the connection. Another controller must not be affected, and
// everything must be freed.
func FuzzCapsule(f *testing.F) {
	for _, build := range []func(*nvme.Command){
		func(c *nvme.Command) { c.SetRead(1, 0, 8, true); c.SetKeyedSGL(0, 4096, 1, true) },
		func(c *nvme.Command) { c.SetWrite(1, 0, 1, false); c.SetInCapsuleSGL(0, 512) },
		func(c *nvme.Command) { c.SetDSM(1, 256); c.SetInCapsuleSGL(0, 4096) },
		func(c *nvme.Command) { c.SetDSM(1, 1); c.SetInCapsuleSGL(0, 16) },
		func(c *nvme.Command) { c.SetWriteZeroes(1, 0, 65536, false, false) },
		func(c *nvme.Command) { c.SetGetLogPage(nvme.LogANA, 0, 4096, 1<<40, false) },
		func(c *nvme.Command) { c.SetIdentify(nvme.CNSActiveNSList, nvme.NSIDAll, 0) },
		func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureKeepAlive, 1<<31) },
		func(c *nvme.Command) { c.SetAsyncEvent() },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 1<<63, false) },
		func(c *nvme.Command) { c.SetConnect(0, 31, 0, true) },
		func(c *nvme.Command) { c.SetDisconnect() },
	} {
		var cmd nvme.Command
		build(&cmd)
		f.Add(cmd[:], false)
		f.Add(append(cmd[:], make([]byte, 4096)...), true)
	}
	for _, n := range []int{1, 2, 16, 17} {
		capsule := make([]byte, nvme.CommandSize+n*nvme.SGLSize)
		nvme.CommandAt(capsule).SetWrite(1, 0, uint32(n), false)
		nvme.CommandAt(capsule).SetLastSegmentSGL(0, n)
		for i := range n {
			nvme.SGLAt(capsule[nvme.CommandSize+i*nvme.SGLSize:]).SetKeyed(0x1000, 512, 1)
		}
		f.Add(capsule, true)
		f.Add(capsule[:len(capsule)-1], true)
	}
	f.Add([]byte{1, 2, 3}, true)
	f.Fuzz(func(t *testing.T, capsule []byte, io bool) {
		r, _, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
		a := r.admin(testNQN)
		h := a
		if io {
			h = r.io(a, 1, 8)
		}
		witness := r.admin(testNQN)
		capsule = capsule[:min(len(capsule), h.capsule)]
		copy(h.out.Bytes(), capsule)
		h.sendRaw(0, len(capsule))
		// On an I/O queue, the next command is answered whatever the first one
		// did.
		var cmd nvme.Command
		cmd.SetFlush(1)
		cmd.SetCID(0xABCD)
		copy(h.out.Bytes()[h.capsule:], cmd[:])
		h.sendRaw(h.capsule, nvme.CommandSize)
		for h.await() && h.response.CID() != 0xABCD {
		}
		witness.property(nvme.PropCSTS, false)
	})
}

// watched is a store that notices who reaches beyond it.
type watched struct {
	*RAM
	size   int64
	beyond atomic.Int64
}

func (w *watched) check(off, length int64) {
	if off < 0 || length < 0 || off > w.size || length > w.size-off {
		w.beyond.Add(1)
	}
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	w.check(off, int64(len(p)))
	return w.RAM.ReadAt(p, off)
}

func (w *watched) WriteAt(p []byte, off int64) (int, error) {
	w.check(off, int64(len(p)))
	return w.RAM.WriteAt(p, off)
}

func (w *watched) Discard(off, length int64) error {
	w.check(off, length)
	return w.RAM.Discard(off, length)
}

func (w *watched) WriteZeroes(off, length int64) error {
	w.check(off, length)
	return w.RAM.WriteZeroes(off, length)
}

// Bits of the byte before each command in the input of FuzzCommands.
const (
	fuzzIO     = 1 << iota // on the I/O queue instead of the admin queue
	fuzzKey                // with the key and the address of the host's memory
	fuzzInline             // with 4096 bytes in the capsule
	fuzzList               // with descriptors of the host's memory in the capsule, 512 bytes each
)

const fuzzRecord = 1 + nvme.CommandSize

// fuzzRecords returns the records of FuzzCommands for some commands.
func fuzzRecords(flags byte, build ...func(*nvme.Command)) []byte {
	var out []byte
	for _, b := range build {
		var cmd nvme.Command
		b(&cmd)
		out = append(append(out, flags), cmd[:]...)
	}
	return out
}

// FuzzCommands sends commands with any content to a live controller. Each command gets
// exactly one completion, or the connection ends. No store is used beyond its end,
// another controller is not affected, and everything is freed.
func FuzzCommands(f *testing.F) {
	keyed := func(n uint32) func(*nvme.Command) { return func(c *nvme.Command) { c.SetKeyedSGL(0, n, 0, false) } }
	with := func(n uint32, set func(*nvme.Command)) func(*nvme.Command) {
		return func(c *nvme.Command) { set(c); keyed(n)(c) }
	}
	f.Add(fuzzRecords(fuzzIO|fuzzKey,
		with(4096, func(c *nvme.Command) { c.SetRead(1, 0, 8, true) }),
		with(4096, func(c *nvme.Command) { c.SetWrite(1, 120, 8, true) }),
		with(65536, func(c *nvme.Command) { c.SetRead(1, 0, 128, false) }),
		with(65536, func(c *nvme.Command) { c.SetRead(1, 1<<63, 128, false) }),
		with(512, func(c *nvme.Command) { c.SetWrite(1, 1<<64-1, 1, false) }),
		with(512, func(c *nvme.Command) { c.SetRead(1, 0, 1, false); c.SetOpcode(nvme.OpCompare) }),
		with(4096, func(c *nvme.Command) { c.SetDSM(1, 256) }),
		with(16, func(c *nvme.Command) { c.SetDSM(1, 1) }),
		func(c *nvme.Command) { c.SetWriteZeroes(1, 100, 65536, true, true) },
		func(c *nvme.Command) { c.SetWriteZeroes(1, 0, 128, true, true) },
		func(c *nvme.Command) { c.SetFlush(nvme.NSIDAll) },
	))
	f.Add(fuzzRecords(fuzzIO|fuzzInline,
		func(c *nvme.Command) { c.SetWrite(1, 0, 8, false); c.SetInCapsuleSGL(0, 4096) },
		func(c *nvme.Command) { c.SetWrite(1, 0, 1, false); c.SetInCapsuleSGL(1<<64-512, 512) },
		func(c *nvme.Command) { c.SetWrite(1, 0, 1, false); c.SetInCapsuleSGL(4095, 512) },
		func(c *nvme.Command) { c.SetDSM(1, 256); c.SetInCapsuleSGL(0, 4096) },
		func(c *nvme.Command) { c.SetRead(1, 0, 8, false); c.SetInCapsuleSGL(0, 4096) },
	))
	f.Add(fuzzRecords(fuzzIO|fuzzList,
		func(c *nvme.Command) { c.SetWrite(1, 0, 16, false); c.SetLastSegmentSGL(0, 16) },
		func(c *nvme.Command) { c.SetRead(1, 112, 16, false); c.SetLastSegmentSGL(0, 16) },
		func(c *nvme.Command) { c.SetRead(1, 0, 2, false); c.SetLastSegmentSGL(4096-32, 2) },
		func(c *nvme.Command) { c.SetRead(1, 0, 2, false); c.SetLastSegmentSGL(4096-16, 2) },
		func(c *nvme.Command) { c.SetRead(1, 0, 2, false); c.SetLastSegmentSGL(1<<64-16, 2) },
		func(c *nvme.Command) { c.SetRead(1, 0, 2, false); c.SetLastSegmentSGL(8, 2) },
		func(c *nvme.Command) { c.SetRead(1, 0, 17, false); c.SetLastSegmentSGL(0, 17) },
		func(c *nvme.Command) { c.SetDSM(1, 1); c.SetLastSegmentSGL(0, 1) },
		func(c *nvme.Command) { c.SetFlush(1); c.SetLastSegmentSGL(0, 0) },
	))
	admin := []func(*nvme.Command){
		with(4096, func(c *nvme.Command) { c.SetIdentify(nvme.CNSActiveNSList, nvme.NSIDAll, 0) }),
		with(4096, func(c *nvme.Command) { c.SetIdentify(0xFF, 1, 0xFF) }),
		with(4096, func(c *nvme.Command) { c.SetGetLogPage(nvme.LogANA, 0, 4096, 1<<40, false) }),
		with(65536, func(c *nvme.Command) { c.SetGetLogPage(nvme.LogChangedNamespaces, 0, 65536, 0, false) }),
		with(1<<24-1, func(c *nvme.Command) { c.SetGetLogPage(nvme.LogSMART, 0, 1<<32-4, 1<<64-4, true) }),
		func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureKeepAlive, 1<<32-1) },
		func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureNumberOfQueues, 1<<32-1) },
		func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureWriteProtect, 1) },
		func(c *nvme.Command) { c.SetAbort(0xFFFF, 0xFFFF) },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 1<<64-1, false) },
		func(c *nvme.Command) { c.SetPropertyGet(1<<32-1, true) },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 0, false) },
		with(1024, func(c *nvme.Command) { c.SetConnect(0, 31, 0, true) }),
		func(c *nvme.Command) { c.SetDisconnect() },
	}
	for range 3 * aerLimit {
		admin = append(admin, func(c *nvme.Command) { c.SetAsyncEvent() })
	}
	f.Add(fuzzRecords(fuzzKey, admin...))
	for _, one := range admin {
		f.Add(fuzzRecords(fuzzKey|fuzzIO, one))
	}
	f.Fuzz(fuzzCommands)
}

func fuzzCommands(t *testing.T, input []byte) {
	const entries, most = 16, 24
	r := newRig(t, Config{MaxTransfer: 64 << 10, QueueSize: entries}, SubsystemConfig{})
	store := &watched{RAM: NewRAM(64 << 10), size: 64 << 10}
	if _, err := r.subsys.AddNamespace(NamespaceConfig{Store: store}); err != nil {
		t.Fatal(err)
	}
	a := r.admin(testNQN)
	io := r.io(a, 1, entries)
	witness := r.admin(testNQN)
	var sent, answered [2]map[uint16]bool // by queue and command id; event requests need no answer
	open := [2]bool{true, true}
	queues := [2]*hostQueue{a, io}
	for i := range sent {
		sent[i], answered[i] = map[uint16]bool{}, map[uint16]bool{}
	}
	// reap takes completions until only those of event requests are missing.
	reap := func(i int) {
		for open[i] && len(sent[i]) > 0 {
			if open[i] = queues[i].await(); !open[i] {
				return
			}
			cid := queues[i].response.CID()
			if answered[i][cid] || cid >= most && cid != 0xABCD {
				t.Fatalf("queue %d: completion %v of no command", i, &queues[i].response)
			}
			answered[i][cid] = true
			delete(sent[i], cid)
		}
	}
	for cid := uint16(0); len(input) >= fuzzRecord && cid < most; cid++ {
		flags := input[0]
		cmd := nvme.Command(input[1:fuzzRecord])
		input = input[fuzzRecord:]
		i := int(flags & fuzzIO)
		h := queues[i]
		if !open[i] {
			continue
		}
		cmd.SetCID(cid)
		if _, n, _, invalidate, ok := cmd.KeyedSGL(); ok && flags&fuzzKey != 0 && n <= dataSize {
			cmd.SetKeyedSGL(h.data.Addr(), n, h.data.RKey(), invalidate)
		}
		var inline []byte
		if flags&fuzzInline != 0 && i == 1 {
			inline = make([]byte, DefaultInCapsule)
		}
		if flags&fuzzList != 0 && i == 1 {
			for len(inline) < DefaultInCapsule {
				s := nvme.KeyedSGL(h.data.Addr()+uint64(32*len(inline)), 512, h.data.RKey(), false)
				inline = append(inline, s[:]...)
			}
		}
		h.send(&cmd, inline)
		if i != 0 || cmd.Opcode() != nvme.AdminAsyncEvent {
			sent[i][cid] = true
		}
		if cid%4 == 3 {
			reap(i)
		}
	}
	for i, h := range queues {
		reap(i)
		var last nvme.Command
		last.SetDisconnect() // no queue supports this command, so each answers with an error
		last.SetCID(0xABCD)
		if open[i] {
			sent[i][0xABCD] = true
			h.send(&last, nil)
			reap(i)
		}
	}
	witness.property(nvme.PropCSTS, false)
	if n := store.beyond.Load(); n > 0 {
		t.Errorf("the store was used beyond its end %d times", n)
	}
}
