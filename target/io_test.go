package target

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// TestReadWrite writes data and reads it back in every way in which data can be
// transferred.
func TestReadWrite(t *testing.T) {
	for _, block := range []int{512, 4096} {
		for _, capsule := range []int{-1, 4096, 16384} {
			t.Run(fmt.Sprintf("blocks of %d, %d in capsule", block, capsule), func(t *testing.T) {
				r, ram, _ := newDisk(t, Config{InCapsule: capsule}, 4<<20, NamespaceConfig{BlockSize: block})
				h := r.io(r.admin(testNQN), 1, 32)
				want := make([]byte, 4<<20)
				rnd := rand.New(rand.NewPCG(1, uint64(block)))
				for i := range 300 {
					n := (1 + rnd.IntN(1<<rnd.IntN(9))) * block
					n = min(n, 1<<20)
					slba := rnd.IntN((len(want) - n) / block)
					at := want[slba*block:][:n]
					var cmd nvme.Command
					switch rnd.IntN(4) {
					case 0:
						cmd.SetRead(1, uint64(slba), uint32(n/block), false)
						clear(h.data.Bytes()[:n])
						h.want(0, h.keyed(&cmd, n))
						if !bytes.Equal(h.data.Bytes()[:n], at) {
							t.Fatalf("read %d: %d bytes from block %d are wrong", i, n, slba)
						}
					case 1:
						cmd.SetWriteZeroes(1, uint64(slba), uint32(n/block), true, true)
						h.want(0, &cmd)
						clear(at)
					default:
						pattern(at, rnd.Uint64())
						cmd.SetWrite(1, uint64(slba), uint32(n/block), rnd.IntN(2) == 0)
						if n <= capsule && rnd.IntN(2) == 0 {
							cmd.SetInCapsuleSGL(0, uint32(n))
							h.want(0, &cmd, at...)
						} else {
							copy(h.data.Bytes(), at)
							h.want(0, h.keyed(&cmd, n))
						}
					}
				}
				if !bytes.Equal(ram.mapping.data, want) {
					t.Error("the store holds something else")
				}
			})
		}
	}
}

func TestRefusedIO(t *testing.T) {
	r, _, ns := newDisk(t, Config{MaxTransfer: 64 << 10}, 1<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	const last = 1<<20/512 - 1
	var cmd nvme.Command
	read := func(nsid uint32, slba uint64, nlb uint32, length int) *nvme.Command {
		cmd.SetRead(nsid, slba, nlb, false)
		return h.keyed(&cmd, length)
	}
	h.want(0, read(1, last, 1, 512))
	h.want(nvme.StatusLBAOutOfRange|dnr, read(1, last, 2, 1024))
	h.want(nvme.StatusLBAOutOfRange|dnr, read(1, 1<<64-1, 1, 512))
	h.want(nvme.StatusInvalidNamespace|dnr, read(2, 0, 1, 512))
	h.want(nvme.StatusInvalidNamespace|dnr, read(0, 0, 1, 512))
	h.want(nvme.StatusInvalidNamespace|dnr, read(nvme.NSIDAll, 0, 1, 512))
	h.want(nvme.StatusInvalidSGLDataLength|dnr, read(1, 0, 2, 512))
	h.want(nvme.StatusInvalidField|dnr, read(1, 0, 256, 128<<10))
	h.want(0, read(1, 0, 128, 64<<10))

	read(1, 0, 1, 512).SetFlags(0)
	h.want(nvme.StatusInvalidField|dnr, &cmd)
	read(1, 0, 1, 512)[39] = 0x50
	h.want(nvme.StatusInvalidSGLType|dnr, &cmd)
	read(1, 0, 1, 512).SetInCapsuleSGL(0, 512)
	h.want(nvme.StatusInvalidField|dnr, &cmd, make([]byte, 512)...)

	write := func(off uint64, length uint32) *nvme.Command {
		cmd.SetWrite(1, 0, 1, false)
		cmd.SetInCapsuleSGL(off, length)
		return &cmd
	}
	h.want(nvme.StatusInvalidSGLOffset|dnr, write(0, 8192), make([]byte, 512)...)
	h.want(nvme.StatusInvalidSGLOffset|dnr, write(1<<63, 512), make([]byte, 512)...)
	h.want(nvme.StatusInvalidSGLDataLength|dnr, write(0, 512), make([]byte, 511)...)
	h.want(0, write(512, 512), make([]byte, 1024)...)
	ns.SetReadOnly(true)
	h.want(nvme.StatusNamespaceWriteProtected, write(0, 512), make([]byte, 512)...)
	cmd.SetOpcode(0x55)
	h.want(nvme.StatusInvalidOpcode|dnr, &cmd, make([]byte, 512)...)

	for state, want := range map[nvme.ANAState]nvme.Status{
		nvme.ANANonOptimized: 0, nvme.ANAInaccessible: nvme.StatusANAInaccessible,
		nvme.ANAPersistentLoss: nvme.StatusANAPersistentLoss, nvme.ANAChange: nvme.StatusANATransition,
	} {
		if err := r.subsys.SetANAState(1, state); err != nil {
			t.Fatal(err)
		}
		h.want(want, read(1, 0, 1, 512))
	}
}

func TestCompareDiscard(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	pattern(ram.mapping.data, 5)
	var cmd nvme.Command
	compare := func(n int) *nvme.Command {
		cmd.SetWrite(1, 8, uint32(n/512), false)
		cmd.SetOpcode(nvme.OpCompare)
		copy(h.data.Bytes(), ram.mapping.data[8*512:][:n])
		return h.keyed(&cmd, n)
	}
	h.want(0, compare(100<<10))
	compare(100 << 10)
	h.data.Bytes()[99<<10] ^= 1
	h.want(nvme.StatusCompareFailed|dnr, &cmd)
	compare(512).SetInCapsuleSGL(0, 512)
	h.want(0, &cmd, ram.mapping.data[8*512:][:512]...)

	want := bytes.Clone(ram.mapping.data)
	clear(want[2*512 : 5*512])
	clear(want[100*512 : 101*512])
	cmd.SetDSM(1, 2)
	nvme.PutDSMRange(h.data.Bytes(), 0, 3, 2)
	nvme.PutDSMRange(h.data.Bytes()[16:], 0, 1, 100)
	h.want(0, h.keyed(&cmd, 4096)) // hosts send a whole page
	if !bytes.Equal(want, ram.mapping.data) {
		t.Error("the wrong blocks were discarded")
	}
	nvme.PutDSMRange(h.data.Bytes()[16:], 0, 2, 2047)
	h.want(nvme.StatusLBAOutOfRange|dnr, &cmd)
	h.want(nvme.StatusInvalidSGLDataLength|dnr, h.keyed(&cmd, 16))
}

// TestRemoteInvalidate requests that the response invalidates a key.
func TestRemoteInvalidate(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	var cmd nvme.Command
	cmd.SetRead(1, 0, 8, false)
	h.want(0, h.keyed(&cmd, 4096))
	if h.key != 0 {
		t.Error("a key was invalidated unasked")
	}
	cmd.SetKeyedSGL(h.data.Addr(), 4096, h.data.RKey(), true)
	h.want(0, &cmd)
	if h.key != h.data.RKey() {
		t.Errorf("key %#x was invalidated, not %#x", h.key, h.data.RKey())
	}
}

// TestFullQueue keeps a queue full of large commands, for which there are not enough
// chunks.
func TestFullQueue(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 4<<20, NamespaceConfig{})
	pattern(ram.mapping.data, 9)
	h := r.io(r.admin(testNQN), 1, 64)
	var cmd nvme.Command
	answered := 0
	copy(h.data.Bytes()[1<<20:], ram.mapping.data[1<<20:2<<20])
	want := bytes.Clone(ram.mapping.data)
	for i := range 500 {
		cmd.SetRead(1, uint64(i%4)*2048, 2048, false)
		if i%2 == 1 {
			cmd.SetWrite(1, 2048, 2048, false)
			cmd.SetKeyedSGL(h.data.Addr()+1<<20, 1<<20, h.data.RKey(), false)
		} else {
			h.keyed(&cmd, 1<<20)
		}
		cmd.SetCID(uint16(i))
		if i-answered == 63 {
			if !h.await() || !h.response.Status().OK() {
				t.Fatalf("response %v", &h.response)
			}
			answered++
		}
		h.send(&cmd, nil)
	}
	for ; answered < 500; answered++ {
		if !h.await() || !h.response.Status().OK() {
			t.Fatalf("response %v", &h.response)
		}
	}
	if !bytes.Equal(ram.mapping.data, want) {
		t.Error("the store holds something else")
	}
	s := r.target.Snapshot()
	if c := s.Controllers[0].Queues[1]; c.QID != 1 || c.Entries != 64 || c.Commands[nvme.OpRead] != 250 || c.BytesRead != 250<<20 || s.IO.BytesWritten != 250<<20 || s.IO.Errors != 0 {
		t.Errorf("snapshot %+v", s)
	}
}

// TestWrongKey uses a key that the host does not have. This ends the connection and its
// controller, but no other one.
func TestWrongKey(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	a, b := r.admin(testNQN), r.admin(testNQN)
	bad, good := r.io(a, 1, 32), r.io(b, 1, 32)
	var cmd nvme.Command
	cmd.SetRead(1, 0, 8, false)
	cmd.SetKeyedSGL(bad.data.Addr(), 4096, bad.data.RKey()+77, false)
	bad.send(&cmd, nil)
	if bad.await() {
		t.Errorf("response %v", &bad.response)
	}
	good.want(0, good.keyed(&cmd, 4096))
	a.property(nvme.PropCSTS, false) // the controller lives on
}

// TestDelayedFabric delays the effect of work requests, so that buffers that are reused
// too early show up.
func TestDelayedFabric(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	r.fabric.SetDelay(200 * time.Microsecond)
	const slots, size = 24, 40 << 10 // more than one chunk, but not a multiple
	rnd := rand.New(rand.NewPCG(3, 4))
	round := func(build func(cmd *nvme.Command, slot int) []byte) {
		t.Helper()
		for _, slot := range rnd.Perm(slots) {
			var cmd nvme.Command
			inline := build(&cmd, slot)
			if inline == nil {
				cmd.SetKeyedSGL(h.data.Addr()+uint64(slot*size), size, h.data.RKey(), false)
			}
			cmd.SetCID(uint16(slot))
			h.send(&cmd, inline)
		}
		for range slots {
			if !h.await() || !h.response.Status().OK() {
				t.Fatalf("response %v", &h.response)
			}
		}
	}
	for i := range 5 {
		pattern(h.data.Bytes()[:slots*size], uint64(i))
		want := bytes.Clone(h.data.Bytes()[:slots*size])
		round(func(cmd *nvme.Command, slot int) []byte {
			cmd.SetWrite(1, uint64(slot*size/512), size/512, false)
			return nil
		})
		round(func(cmd *nvme.Command, slot int) []byte { // new data for every other slot, in the capsule
			at := want[slot*size:][:512]
			if slot%2 == 0 {
				pattern(at, uint64(100*i+slot))
			}
			cmd.SetWrite(1, uint64(slot*size/512), 1, false)
			cmd.SetInCapsuleSGL(0, 512)
			return at
		})
		clear(h.data.Bytes())
		round(func(cmd *nvme.Command, slot int) []byte {
			cmd.SetRead(1, uint64(slot*size/512), size/512, false)
			return nil
		})
		if !bytes.Equal(want, h.data.Bytes()[:slots*size]) || !bytes.Equal(want, ram.mapping.data[:slots*size]) {
			t.Fatalf("round %d: data is wrong", i)
		}
	}
}
