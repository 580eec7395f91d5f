package target

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// TestIdentity: a namespace that is added again is the same for its hosts if its
// subsystem, its id and its Identity are the same.
func TestIdentity(t *testing.T) {
	uuid := func(nqn string, cfg NamespaceConfig) nvme.UUID {
		t.Helper()
		r := newRig(t, Config{}, SubsystemConfig{})
		s, err := r.target.AddSubsystem(SubsystemConfig{NQN: nqn, AllowAny: true})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Store = NewRAM(4096)
		n, err := s.AddNamespace(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return n.UUID()
	}
	first := uuid("nqn.a", NamespaceConfig{Identity: "/disk"})
	if got := uuid("nqn.a", NamespaceConfig{NSID: 1, Identity: "/disk"}); got != first || first.IsZero() {
		t.Errorf("after a restart %v, was %v", got, first)
	}
	for name, other := range map[string]nvme.UUID{
		"another subsystem": uuid("nqn.b", NamespaceConfig{Identity: "/disk"}),
		"another id":        uuid("nqn.a", NamespaceConfig{NSID: 2, Identity: "/disk"}),
		"another file":      uuid("nqn.a", NamespaceConfig{Identity: "/disk2"}),
		"no identity":       uuid("nqn.a", NamespaceConfig{}),
	} {
		if other == first || other.IsZero() {
			t.Errorf("%s: %v", name, other)
		}
	}
	if got := uuid("nqn.a", NamespaceConfig{NoUUID: true, Identity: "/disk"}); !got.IsZero() {
		t.Errorf("without a UUID: %v", got)
	}
	given := nvme.NewUUID()
	if got := uuid("nqn.a", NamespaceConfig{UUID: given, Identity: "/disk"}); got != given {
		t.Errorf("given %v, got %v", given, got)
	}
}

// TestSerial: a subsystem has the same serial number at every start, which differs from
// those of other subsystems.
func TestSerial(t *testing.T) {
	serial := func(nqn string) string {
		c := SubsystemConfig{NQN: nqn}
		if err := c.setDefaults(); err != nil {
			t.Fatal(err)
		}
		return c.Serial
	}
	if a, b := serial("nqn.a"), serial("nqn.b"); a != serial("nqn.a") || a == b || len(a) != 20 {
		t.Errorf("%q and %q", a, b)
	}
}

// TestIdentifiers: a namespace with NGUID and EUI-64 and without a UUID.
func TestIdentifiers(t *testing.T) {
	cfg := NamespaceConfig{NoUUID: true, NGUID: [16]byte{1}, EUI64: [8]byte{2}}
	r, _, _ := newDisk(t, Config{}, 1<<20, cfg)
	a := r.admin(testNQN)
	ids, err := nvme.ParseNamespaceDescriptors(a.identify(nvme.CNSNamespaceDescriptors, 1))
	if err != nil || ids.NGUID != cfg.NGUID || ids.EUI64 != cfg.EUI64 || !ids.UUID.IsZero() {
		t.Errorf("descriptors %+v, %v", ids, err)
	}
	if ns := nvme.IdentifyNamespaceAt(a.identify(nvme.CNSNamespace, 1)); ns.NGUID() != cfg.NGUID || ns.EUI64() != cfg.EUI64 {
		t.Errorf("NGUID %x, EUI64 %x", ns.NGUID(), ns.EUI64())
	}
}

// TestSizes: a namespace has a positive number of whole blocks.
func TestSizes(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	for _, c := range []struct {
		size  int64
		block int
	}{{0, 512}, {511, 512}, {1000, 512}, {4096 + 512, 4096}} {
		if _, err := r.subsys.AddNamespace(NamespaceConfig{Store: NewRAM(c.size), BlockSize: c.block}); err == nil {
			t.Errorf("%d bytes in blocks of %d are accepted", c.size, c.block)
		}
	}
	ram := NewRAM(4096)
	n, err := r.subsys.AddNamespace(NamespaceConfig{Store: ram})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{-1, 0, 1000, MaxRAM + 512} {
		if err := n.Resize(t.Context(), size, func() error { return ram.Resize(size) }); err == nil || ram.Size() != 4096 || n.blocks.Load() != 8 {
			t.Errorf("%d bytes: %v, store of %d, %d blocks", size, err, ram.Size(), n.blocks.Load())
		}
	}
}

// TestStoreAtRest: the removal, replacement and shrinking of a namespace wait for the
// commands inside its store. No earlier command enters the store after that.
func TestStoreAtRest(t *testing.T) {
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	for name, change := range map[string]func(r *rig, g *gate, n *Namespace) func(ctx context.Context) error{
		"remove": func(r *rig, _ *gate, n *Namespace) func(context.Context) error {
			if err := r.subsys.RemoveNamespace(1); err != nil {
				r.t.Error(err)
			}
			return n.Drained
		},
		"replace": func(r *rig, _ *gate, n *Namespace) func(context.Context) error {
			if _, err := r.subsys.ReplaceNamespace(NamespaceConfig{NSID: 1, Store: NewRAM(1 << 20)}); err != nil {
				r.t.Error(err)
			}
			return n.Drained
		},
		"shrink": func(_ *rig, g *gate, n *Namespace) func(context.Context) error {
			return func(ctx context.Context) error {
				return n.Resize(ctx, 4096, func() error { return g.Resize(4096) })
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, g, a, io := heldWrite(t)
			n := r.subsys.namespace(1)
			// A second write waits in the queue behind the one that is held.
			var cmd nvme.Command
			cmd.SetWrite(1, 64, 8, false)
			cmd.SetInCapsuleSGL(0, 4096)
			io.send(&cmd, bytes.Repeat([]byte{2}, 4096))
			wait := change(r, g, n)
			if err := wait(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("with a command inside: %v", err)
			}
			time.AfterFunc(20*time.Millisecond, g.open)
			if err := wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			size := g.Size()
			if name == "shrink" && size != 4096 {
				t.Errorf("%d bytes", size)
			}
			for _, want := range []nvme.Status{0, map[bool]nvme.Status{true: nvme.StatusLBAOutOfRange | dnr, false: nvme.StatusInvalidNamespace | dnr}[name == "shrink"]} {
				if name == "replace" && want != 0 {
					want = 0 // the new namespace executes it
				}
				if !io.await() || io.response.Status() != want {
					t.Errorf("response %v, want %v", &io.response, want)
				}
			}
			a.property(nvme.PropCSTS, false)
			var got [1]byte
			if size > 64*512 {
				if _, err := g.ReadAt(got[:], 64*512); err != nil || got[0] != 0 {
					t.Errorf("the old store has %d, %v", got[0], err)
				}
			}
		})
	}
}

// pieces is a store that records the lengths of the ranges that it zeroes.
type pieces struct {
	*RAM
	lengths chan int64
}

func (p *pieces) WriteZeroes(_, length int64) error { p.lengths <- length; return nil }
func (p *pieces) Discard(_, length int64) error     { p.lengths <- length; return nil }

// TestLongRanges: a command that zeroes gigabytes is executed in pieces, and ends
// between two pieces if its queue or its namespace ends.
func TestLongRanges(t *testing.T) {
	const size = 4 << 40
	discard := func(h *hostQueue) *nvme.Command {
		var cmd nvme.Command
		cmd.SetDSM(1, 1)
		nvme.PutDSMRange(h.data.Bytes(), 0, 1<<32-1, 5)
		return h.keyed(&cmd, nvme.DSMRangeSize)
	}
	next := func(t *testing.T, p *pieces) int64 {
		t.Helper()
		select {
		case n := <-p.lengths:
			return n
		case <-time.After(patience):
			t.Fatal("no piece")
		}
		return 0
	}
	setup := func(t *testing.T) (*rig, *pieces, *hostQueue) {
		r := newRig(t, Config{}, SubsystemConfig{})
		p := &pieces{NewRAM(size), make(chan int64)}
		if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 1, Store: p}); err != nil {
			t.Fatal(err)
		}
		return r, p, r.io(r.admin(testNQN), 1, 32)
	}
	t.Run("whole", func(t *testing.T) {
		_, p, h := setup(t)
		var cmd nvme.Command
		cmd.SetWriteZeroes(1, 0, 65536, false, true) // 32 MiB
		h.send(&cmd, nil)
		if n := next(t, p); n != 32<<20 {
			t.Errorf("%d bytes", n)
		}
		if !h.await() || !h.response.Status().OK() {
			t.Errorf("response %v", &h.response)
		}
		h.send(discard(h), nil)
		for left := int64(1<<32-1) * 512; left > 0; {
			n := next(t, p)
			if left -= n; n > maxPiece {
				t.Fatalf("a piece of %d bytes", n)
			}
		}
		if !h.await() || !h.response.Status().OK() {
			t.Errorf("response %v", &h.response)
		}
	})
	for name, end := range map[string]func(r *rig){
		"queue": func(r *rig) { r.target.Faults().Disconnect(1) },
		"namespace": func(r *rig) {
			if err := r.subsys.RemoveNamespace(1); err != nil {
				r.t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, p, h := setup(t)
			h.send(discard(h), nil)
			next(t, p)
			end(r)
			h.t = t
			ended := make(chan bool, 1)
			go func() { ended <- h.await() && h.response.Status() == nvme.StatusInvalidNamespace|dnr }()
			for n := 0; ; n++ {
				select {
				case <-p.lengths:
					if n > 2 {
						t.Fatal("it goes on")
					}
					continue
				case answered := <-ended:
					if answered != (name == "namespace") {
						t.Errorf("response %v", &h.response)
					}
				}
				break
			}
		})
	}
}

// TestExtremes tests fields of commands at the limits of their ranges.
func TestExtremes(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	var cmd nvme.Command
	for _, slba := range []uint64{2041, 2048, 1 << 32, 1<<55 - 1, 1 << 55, 1<<63 - 1, 1 << 63, 1<<64 - 8, 1<<64 - 1} {
		cmd.SetRead(1, slba, 8, false)
		h.want(nvme.StatusLBAOutOfRange|dnr, h.keyed(&cmd, 4096))
		cmd.SetWrite(1, slba, 8, false)
		h.want(nvme.StatusLBAOutOfRange|dnr, h.keyed(&cmd, 4096))
		cmd.SetWriteZeroes(1, slba, 65536, false, true)
		h.want(nvme.StatusLBAOutOfRange|dnr, &cmd)
		cmd.SetDSM(1, 1)
		nvme.PutDSMRange(h.data.Bytes(), 0, 1<<32-1, slba)
		h.want(nvme.StatusLBAOutOfRange|dnr, h.keyed(&cmd, nvme.DSMRangeSize))
	}
	for _, c := range []struct {
		offset uint64
		length uint32
		status nvme.Status
	}{
		{1<<64 - 1, 512, nvme.StatusInvalidSGLOffset}, {1<<64 - 512, 512, nvme.StatusInvalidSGLOffset}, {0, 1<<32 - 1, nvme.StatusInvalidSGLOffset},
		{4096, 512, nvme.StatusInvalidSGLOffset}, {3584, 512, nvme.StatusInvalidSGLDataLength},
	} {
		cmd.SetWrite(1, 0, 1, false)
		cmd.SetInCapsuleSGL(c.offset, c.length)
		h.want(c.status|dnr, &cmd, make([]byte, 512)...)
	}
	for _, nsid := range []uint32{0, 2, MaxNamespaces + 1, 1 << 31, nvme.NSIDAll} {
		cmd.SetFlush(nsid)
		h.want(nvme.StatusInvalidNamespace|dnr, &cmd)
	}
}
