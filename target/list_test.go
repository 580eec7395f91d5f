package target

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"ublk-nvmeof/nvme"
)

// place is a part of h.data.
type place struct{ at, n uint32 }

// scatter returns n places of so many bytes, which do not touch each other.
func scatter(n int, size uint32) (all []place) {
	for i := range uint32(n) {
		all = append(all, place{4 + i*(size+64), size})
	}
	return all
}

// list makes places the data of a command, and returns the list for its capsule.
func (h *hostQueue) list(cmd *nvme.Command, places ...place) (inline []byte) {
	cmd.SetLastSegmentSGL(0, len(places))
	for _, p := range places {
		s := nvme.KeyedSGL(h.data.Addr()+uint64(p.at), p.n, h.data.RKey(), false)
		inline = append(inline, s[:]...)
	}
	return inline
}

// gathered returns the data in places.
func (h *hostQueue) gathered(places []place) (data []byte) {
	for _, p := range places {
		data = append(data, h.data.Bytes()[p.at:][:p.n]...)
	}
	return data
}

// TestList reads and writes data that is in several places of the host.
func TestList(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	disk := make([]byte, 4<<20)
	pattern(disk, 1)
	if _, err := ram.WriteAt(disk, 0); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for _, places := range [][]place{
		{{0, 512}}, {{512, 512}, {0, 512}}, {{8, 100}, {4096, 412}}, {{0, 0}, {64, 512}, {0, 0}},
		scatter(16, 4096), scatter(16, 32), scatter(16, 64<<10), {{1, 1}, {3, 1}, {5, 510}}, scatter(3, 512),
	} {
		length := uint32(0)
		for _, p := range places {
			length += p.n
		}
		rng.Shuffle(len(places), func(i, j int) { places[i], places[j] = places[j], places[i] })
		slba := uint64(rng.IntN(64))
		var cmd nvme.Command

		clear(h.data.Bytes())
		cmd.SetRead(1, slba, length/512, false)
		h.want(0, &cmd, h.list(&cmd, places...)...)
		if !bytes.Equal(h.gathered(places), disk[512*slba:][:length]) {
			t.Errorf("%v: wrong data", places)
		}
		for _, p := range places {
			clear(h.data.Bytes()[p.at:][:p.n])
		}
		if !bytes.Equal(h.data.Bytes(), make([]byte, dataSize)) {
			t.Errorf("%v: a read has written to another place", places)
		}

		pattern(h.data.Bytes(), rng.Uint64())
		want := h.gathered(places)
		cmd.SetWrite(1, slba, length/512, false)
		h.want(0, &cmd, h.list(&cmd, places...)...)
		got := make([]byte, length)
		if _, err := ram.ReadAt(got, int64(512*slba)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: wrong data was written, %v", places, err)
		}
		copy(disk[512*slba:], want)
		cmd.SetOpcode(nvme.OpCompare)
		h.want(0, &cmd, h.list(&cmd, places...)...)
	}
	got := make([]byte, len(disk))
	if _, err := ram.ReadAt(got, 0); err != nil || !bytes.Equal(got, disk) {
		t.Errorf("other blocks have changed, %v", err)
	}
	if n := r.target.Snapshot().IO.Lists; n != 27 {
		t.Errorf("%d lists were counted, want 27", n)
	}
}

// TestListWithOffset has a list behind other data in the capsule, and one of which the command needs
// less than its descriptors have.
func TestListWithOffset(t *testing.T) {
	r, ram, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	pattern(h.data.Bytes(), 1)
	places := scatter(2, 512)
	var cmd nvme.Command
	cmd.SetWrite(1, 0, 2, false)
	inline := append(make([]byte, 40), h.list(&cmd, places...)...)
	cmd.SetLastSegmentSGL(40, 2)
	h.want(0, &cmd, inline...)
	got := make([]byte, 1024)
	if _, err := ram.ReadAt(got, 0); err != nil || !bytes.Equal(got, h.gathered(places)) {
		t.Errorf("wrong data was written, %v", err)
	}
	cmd.SetDSM(1, 2)
	inline = h.list(&cmd, place{1000, 16}, place{2000, 4096 - 16})
	clear(h.data.Bytes()[:8192])
	nvme.PutDSMRange(h.data.Bytes()[1000:], 0, 1, 1)
	h.want(0, &cmd, inline...)
	clear(got[512:])
	now := make([]byte, 1024)
	if _, err := ram.ReadAt(now, 0); err != nil || !bytes.Equal(now, got) {
		t.Errorf("a discard with a list of two places: wrong blocks, %v", err)
	}
}

// TestWrongLists sends lists that are wrong. Each command is refused, and the queue goes on.
func TestWrongLists(t *testing.T) {
	r, _, _ := newDisk(t, Config{MaxTransfer: 64 << 10}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	two := func(set func(list []byte, cmd *nvme.Command) []byte) func(cmd *nvme.Command) []byte {
		return func(cmd *nvme.Command) []byte { return set(h.list(cmd, scatter(2, 512)...), cmd) }
	}
	typed := func(typ byte) func(cmd *nvme.Command) []byte {
		return two(func(list []byte, _ *nvme.Command) []byte { list[31] = typ; return list })
	}
	located := func(offset uint64, n int) func(cmd *nvme.Command) []byte {
		return two(func(list []byte, cmd *nvme.Command) []byte { cmd.SetLastSegmentSGL(offset, n); return list })
	}
	sized := func(size uint32) func(cmd *nvme.Command) []byte {
		return two(func(list []byte, cmd *nvme.Command) []byte {
			cmd[32], cmd[33], cmd[34], cmd[35] = byte(size), byte(size>>8), byte(size>>16), byte(size>>24)
			return list
		})
	}
	for _, c := range []struct {
		name string
		set  func(cmd *nvme.Command) []byte
		want nvme.Status
	}{
		{"empty", sized(0), nvme.StatusInvalidSGLSegment},
		{"length no multiple of 16", sized(24), nvme.StatusInvalidSGLSegment},
		{"length of 4 GiB less 16", sized(1<<32 - 16), nvme.StatusInvalidSGLOffset},
		{"too many", func(cmd *nvme.Command) []byte { return h.list(cmd, scatter(17, 512)...) }, nvme.StatusInvalidSGLCount},
		{"offset beyond the capsule", located(4097, 2), nvme.StatusInvalidSGLOffset},
		{"across the end of the capsule", located(4096-16, 2), nvme.StatusInvalidSGLOffset},
		{"overflow of the offset", located(1<<64-16, 2), nvme.StatusInvalidSGLOffset},
		{"longer than what was sent", located(0, 3), nvme.StatusInvalidSGLSegment},
		{"behind what was sent", located(1024, 1), nvme.StatusInvalidSGLSegment},
		{"one byte is missing", two(func(list []byte, _ *nvme.Command) []byte { return list[:31] }), nvme.StatusInvalidSGLSegment},
		{"nothing was sent", two(func([]byte, *nvme.Command) []byte { return nil }), nvme.StatusInvalidSGLSegment},
		{"descriptor of a list", typed(0x31), nvme.StatusInvalidSGLSegment},
		{"descriptor of a segment", typed(0x21), nvme.StatusInvalidSGLSegment},
		{"descriptor of data in the capsule", typed(0x01), nvme.StatusInvalidSGLType},
		{"data block without key", typed(0x00), nvme.StatusInvalidSGLType},
		{"bit bucket", typed(0x10), nvme.StatusInvalidSGLType},
		{"keyed, invalidate", typed(0x4F), nvme.StatusInvalidSGLType},
		{"keyed, unknown subtype", typed(0x41), nvme.StatusInvalidSGLType},
		{"list by address", two(func(list []byte, cmd *nvme.Command) []byte { cmd[39] = 0x30; return list }), nvme.StatusInvalidSGLType},
		{"list of unknown subtype", two(func(list []byte, cmd *nvme.Command) []byte { cmd[39] = 0x3A; return list }), nvme.StatusInvalidSGLType},
		{"first segment", two(func(list []byte, cmd *nvme.Command) []byte { cmd[39] = 0x21; return list }), nvme.StatusInvalidSGLType},
		{"shorter than the command's data", func(cmd *nvme.Command) []byte { return h.list(cmd, scatter(1, 512)...) }, nvme.StatusInvalidSGLDataLength},
		{"longer than the command's data", func(cmd *nvme.Command) []byte { return h.list(cmd, scatter(3, 512)...) }, nvme.StatusInvalidSGLDataLength},
		{"more than a transfer", func(cmd *nvme.Command) []byte { return h.list(cmd, scatter(16, 4097)...) }, nvme.StatusInvalidField},
		{"lengths add up to 256 MiB", func(cmd *nvme.Command) []byte {
			var places []place
			for range 16 {
				places = append(places, place{0, 1<<24 - 1})
			}
			return h.list(cmd, places...)
		}, nvme.StatusInvalidField},
	} {
		for _, op := range []nvme.Opcode{nvme.OpRead, nvme.OpWrite} {
			var cmd nvme.Command
			cmd.SetRead(1, 0, 2, false)
			cmd.SetOpcode(op)
			inline := c.set(&cmd)
			if got := h.do(&cmd, inline).Status(); got != c.want|dnr {
				t.Errorf("%s, opcode %v: %v, want %v", c.name, op, got, c.want|dnr)
			}
		}
	}
	var cmd nvme.Command
	cmd.SetFlush(1)
	h.want(nvme.StatusInvalidSGLDataLength|dnr, &cmd, h.list(&cmd, scatter(2, 512)...)...)
	cmd.SetRead(1, 0, 2, false)
	h.want(0, &cmd, h.list(&cmd, scatter(2, 512)...)...)
}

// TestListOnAdminQueue: capsules of an admin queue have no room for a list.
func TestListOnAdminQueue(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
	a := r.admin(testNQN)
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	a.list(&cmd, scatter(2, 2048)...)
	a.want(nvme.StatusInvalidSGLOffset|dnr, &cmd)
}

// TestListWithWrongKey: an access that the host's adapter refuses ends the connection.
func TestListWithWrongKey(t *testing.T) {
	for _, op := range []nvme.Opcode{nvme.OpRead, nvme.OpWrite} {
		r, _, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
		a := r.admin(testNQN)
		h := r.io(a, 1, 32)
		var cmd nvme.Command
		cmd.SetRead(1, 0, 3, false)
		cmd.SetOpcode(op)
		list := h.list(&cmd, scatter(3, 512)...)
		list[16+11] ^= 0x55
		h.send(&cmd, list)
		if h.await() {
			t.Errorf("opcode %v was answered: %v", op, &h.response)
		}
		a.property(nvme.PropCSTS, false)
	}
}

// TestManyLists has more commands with lists in flight than there are work requests for, over and
// over again.
func TestManyLists(t *testing.T) {
	r, _, _ := newDisk(t, Config{QueueSize: 256}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 200)
	const depth, all = 150, 2000
	flying := 0
	for n := range all {
		var cmd nvme.Command
		cmd.SetRead(1, uint64(n%64), 16, false)
		if n%3 == 0 {
			cmd.SetOpcode(nvme.OpWrite)
		}
		if flying == depth {
			if !h.await() || !h.response.Status().OK() {
				t.Fatalf("response %v", &h.response)
			}
			flying--
		}
		cmd.SetCID(uint16(n))
		h.send(&cmd, h.list(&cmd, scatter(16, 512)...))
		flying++
	}
	for range flying {
		if !h.await() || !h.response.Status().OK() {
			t.Fatalf("response %v", &h.response)
		}
	}
}

// TestMaxDescriptors checks what controllers announce, and that one without lists refuses them as
// nvmet does.
func TestMaxDescriptors(t *testing.T) {
	for _, c := range []struct {
		set       Config
		want      uint8
		wantLimit int // of the host
	}{
		{Config{}, 16, 16}, {Config{MaxDescriptors: 1}, 1, 1}, {Config{MaxDescriptors: 5}, 5, 5},
		{Config{InCapsule: 48}, 3, 3}, {Config{InCapsule: 16}, 1, 1}, {Config{InCapsule: -1}, 1, 1},
	} {
		r, _, _ := newDisk(t, c.set, 64<<10, NamespaceConfig{})
		a := r.admin(testNQN)
		id := nvme.IdentifyControllerAt(a.identify(nvme.CNSController, 0))
		if id.MSDBD() != c.want || id.KeyedDescriptors() != c.wantLimit {
			t.Errorf("%+v: MSDBD %d, want %d; hosts may use %d", c.set, id.MSDBD(), c.want, id.KeyedDescriptors())
		}
		if c.want > 1 {
			continue
		}
		h := r.io(a, 1, 32)
		var cmd nvme.Command
		cmd.SetRead(1, 0, 1, false)
		cmd.SetLastSegmentSGL(0, 1)
		h.want(nvme.StatusInvalidSGLType|dnr, &cmd)
	}
	for _, n := range []int{-1, 17} {
		if _, err := New(Config{MaxDescriptors: n}); err == nil {
			t.Errorf("%d descriptors: no error", n)
		}
	}
}
