package target

import (
	"bytes"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// faulty is a disk with an I/O queue.
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
	remove := f.Add(Fault{Match: Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpFlush}}, Skip: 1, Count: 2, Status: nvme.StatusUnrecoveredRead | dnr})
	f.Add(Fault{Match: Match{NSID: 9}, Status: nvme.StatusInternal})
	f.Add(Fault{Match: Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminKeepAlive}}, Status: nvme.StatusInternal})
	h.want(0, &cmd)
	h.want(nvme.StatusUnrecoveredRead|dnr, &cmd)
	other.want(0, &cmd)
	h.want(nvme.StatusUnrecoveredRead|dnr, &cmd)
	h.want(0, &cmd)
	cmd.SetFlush(9)
	h.want(nvme.StatusInternal, &cmd)
	remove()
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
	for range 20 { // dropped commands leave buffers and completions
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
	h.want(0, &cmd) // overtakes them
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
	free := r.mustDial(0, adminDepth) // connections are still made
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
	// The fabric, as an adapter does, breaks the connection of a wrong key.
	f.Add(Fault{Corrupt: CorruptKey})
	h.send(&cmd, nil)
	if h.await() {
		t.Errorf("response %v", &h.response)
	}
}
