package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/vhost/vhosttest"
)

// guestLoad is a guest that writes to a disk without end, over as many servers as there
// are. Each of its rings writes sectors of its own, each with a higher number than before.
type guestLoad struct {
	t     *testing.T
	guest *vhosttest.Guest
	path  string
	end   chan struct{}
	all   sync.WaitGroup
	done  atomic.Uint64 // completed writes
	// buffer returns where the data of a slot is, as the guest and as the test address it.
	buffer func(r *vhosttest.Ring, slot uint16) (address uint64, mem []byte)

	mu      sync.Mutex // guards what follows
	longest time.Duration
	back    []chan struct{} // closed at the next connection
}

const loadSectors = 64 // of a ring

func newGuestLoad(t *testing.T, path string, rings int) *guestLoad {
	t.Helper()
	g, err := vhosttest.NewGuest(vhosttest.Config{Rings: rings, Data: 4096, Sealed: true})
	if err != nil {
		t.Fatal(err)
	}
	l := &guestLoad{t: t, guest: g, path: path, end: make(chan struct{}), buffer: ownBuffer}
	l.begin(g.Rings)
	return l
}

// ownBuffer is the buffer that a slot has.
func ownBuffer(r *vhosttest.Ring, slot uint16) (address uint64, mem []byte) {
	_, at := r.Slot(slot)
	return vhosttest.GuestBase + at, r.Data(slot)
}

// begin connects the guest, and begins to write with some of its rings.
func (l *guestLoad) begin(rings []*vhosttest.Ring) {
	t, g := l.t, l.guest
	t.Helper()
	if err := g.Connect(l.path); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		l.reconnect(stop)
	}()
	for _, r := range rings {
		l.all.Go(func() { l.write(r) })
	}
	t.Cleanup(func() {
		l.stop()
		close(stop)
		_ = g.Conn.CloseBoth() // the load has ended, so nobody connects any more
		testenv.Receive(t, stopped, "the end of the load")
		_ = g.Close()
	})
}

// stop ends the load after its requests.
func (l *guestLoad) stop() {
	select {
	case <-l.end:
	default:
		close(l.end)
	}
	l.all.Wait()
}

// reconnect connects again whenever the server has gone, as QEMU does.
func (l *guestLoad) reconnect(stop <-chan struct{}) {
	for {
		if err := l.guest.Conn.AwaitEndFor(time.Hour); err != nil {
			l.t.Error(err)
			return
		}
		_ = l.guest.Conn.Close()
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			select {
			case <-stop:
				return
			default:
			}
			err := l.guest.Connect(l.path)
			if err == nil {
				break
			}
			if time.Now().After(end) {
				l.t.Errorf("the guest cannot connect: %v", err)
				return
			}
		}
		l.mu.Lock()
		for _, c := range l.back {
			close(c)
		}
		l.back = nil
		l.mu.Unlock()
	}
}

// write writes the sectors of a ring in turn, 8 at a time, until the end.
func (l *guestLoad) write(r *vhosttest.Ring) {
	round := uint64(0)
	for {
		select {
		case <-l.end:
			return
		default:
		}
		round++
		at := time.Now()
		for first := 0; first < loadSectors; first += 8 {
			var heads []uint16
			for i := range uint64(8) {
				slot := r.Take()
				sector := l.sector(r, uint64(first)+i)
				at, mem := l.buffer(r, slot)
				binary.LittleEndian.PutUint64(mem, sector)
				binary.LittleEndian.PutUint64(mem[8:], round)
				heads = append(heads, r.PrepareAt(slot, vhosttest.Out, sector, at, 512))
			}
			r.Submit(heads...)
			if !l.collect(r, len(heads)) {
				return
			}
			l.done.Add(uint64(len(heads)))
		}
		l.note(time.Since(at))
		if !l.check(r, round) {
			return
		}
	}
}

func (l *guestLoad) sector(r *vhosttest.Ring, i uint64) uint64 {
	return uint64(r.Index)*loadSectors + i
}

func (l *guestLoad) note(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.longest = max(l.longest, d)
}

// collect waits for n requests.
func (l *guestLoad) collect(r *vhosttest.Ring, n int) bool {
	for range n {
		slot, status, err := r.Wait()
		if err != nil || status != vhosttest.OK {
			l.t.Errorf("ring %d: status %d: %v", r.Index, status, err)
			return false
		}
		r.Release(slot)
	}
	return true
}

// check reads the sectors of a ring. Each has what was written to it last.
func (l *guestLoad) check(r *vhosttest.Ring, round uint64) bool {
	slot := r.Take()
	at, mem := l.buffer(r, slot)
	for i := uint64(0); i < loadSectors; i += 8 {
		sector := l.sector(r, i)
		r.Submit(r.PrepareAt(slot, vhosttest.In, sector, at, 4096))
		if got, status, err := r.Wait(); err != nil || status != vhosttest.OK || got != slot {
			l.t.Errorf("ring %d: slot %d, status %d: %v", r.Index, got, status, err)
			return false
		}
		for j := range uint64(8) {
			d := mem[512*j:]
			if s, n := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint64(d[8:]); s != sector+j || n != round {
				l.t.Errorf("ring %d: sector %d has write %d of sector %d, want %d", r.Index, sector+j, n, s, round)
				return false
			}
		}
	}
	r.Release(slot)
	return true
}

// atNextConnection returns a channel that is closed when the guest has connected again.
func (l *guestLoad) atNextConnection() <-chan struct{} {
	c := make(chan struct{})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.back = append(l.back, c)
	return c
}

// progress waits until the guest has completed n more writes.
func (l *guestLoad) progress(n uint64) {
	l.t.Helper()
	from := l.done.Load()
	for end := time.Now().Add(time.Minute); l.done.Load() < from+n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) || l.t.Failed() {
			l.t.Fatalf("the guest has completed %d writes, want %d", l.done.Load()-from, n)
		}
	}
}

// vhostKills is how often a test kills the server: as often as UN_VHOST says.
func vhostKills() int {
	if n, err := strconv.Atoi(os.Getenv("UN_VHOST")); err == nil {
		return n
	}
	return 3
}

// TestVhostServerDies kills and upgrades the server below a guest that writes and reads. The
// guest sees a pause, no error, and always its last write.
func TestVhostServerDies(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:vm"
	s := newSite(t, nqn)
	s.put(nqn, newDisk(""))
	kills := vhostKills()
	s.serverDies(nqn, kills, (kills+2)/3, nil)
}

// TestVhostServerDiesWithPaths does the same with two paths, one of which is dropped at the same
// time, or is away until after the next server has taken over.
func TestVhostServerDiesWithPaths(t *testing.T) {
	testVhostServerDiesWithPaths(t, "nqn.2026-01.org.example:vm-paths", vhostKills())
}

// TestVhostServerDiesZeroCopy does the same with a target that accesses the guest's memory.
func TestVhostServerDiesZeroCopy(t *testing.T) {
	testVhostServerDiesWithPaths(t, "nqn.2026-01.org.example:vm-zero", (vhostKills()+2)/3, "--zero-copy")
}

func testVhostServerDiesWithPaths(t *testing.T, nqn string, kills int, flags ...string) {
	l := newLate(t, nqn)
	away := false
	l.serverDies(nqn, kills, kills, func(round int) {
		if away {
			l.mend()
			away = false
		}
		switch round % 4 {
		case 1, 2:
			ports := l.target.Ports()
			ports[round%len(ports)].Disconnect()
		case 3:
			l.cut()
			away = true
		}
	}, append(flags, "--path", l.second.String())...)
}

// serverDies kills the server of a guest, and then upgrades it, as often as given. before, which may
// be nil, causes a fault before each time. Without faults the guest stays connected over an upgrade.
func (s *site) serverDies(nqn string, kills, upgrades int, before func(round int), more ...string) {
	t := s.t
	faults := before != nil
	if !faults {
		before = func(int) {}
	}
	path := filepath.Join(s.dir, "vm1.sock")
	if err := s.run(s.vhostArgs(nqn, append(more, "--vhost-socket", filepath.Join(s.dir, "vm{nsid}.sock"), "-i", "2")...)...); err != nil {
		t.Fatal(err)
	}
	l := newGuestLoad(t, path, 3)
	var longest [2]time.Duration
	for i := range kills + upgrades {
		l.progress(500)
		before(i)
		l.mu.Lock()
		l.longest = 0
		l.mu.Unlock()
		connected := l.atNextConnection()
		r := s.record(nqn)
		verb := 0
		if i < kills {
			s.kill(r)
			if err := s.run("recover", r.Name); err != nil {
				t.Fatal(err)
			}
			testenv.Receive(t, connected, "the next connection")
		} else {
			verb = 1
			if err := s.run("upgrade", path); err != nil {
				t.Fatal(err)
			}
		}
		l.progress(500)
		select {
		case <-connected:
			if verb == 1 && !faults {
				t.Error("the guest has connected again over an upgrade")
			}
		default:
		}
		l.mu.Lock()
		longest[verb] = max(longest[verb], l.longest)
		l.mu.Unlock()
		if now := s.record(nqn); now.Process == r.Process || len(now.Devices) != 1 || now.Devices[0].Socket != path {
			t.Fatalf("on record: %+v", now)
		}
	}
	l.stop()
	if zero := statusOf(t.Context(), s.record(nqn)); zero.ZeroCopy != "" && zero.RegionBytes != int64(len(l.guest.Mem)) {
		t.Errorf("%d bytes of the guest's memory are registered, want %d", zero.RegionBytes, len(l.guest.Mem))
	} else if zero.ZeroCopy != "" && zero.Places != 1 { // over RoCEv2 in Go
		t.Errorf("data in %d places is not copied, want 1", zero.Places)
	} else if (zero.ZeroCopy == "") == slices.Contains(more, "--zero-copy") {
		t.Errorf("status: zero copy %q with flags %v", zero.ZeroCopy, more)
	}
	t.Logf("%d writes; the longest round took %v over a kill, %v over an upgrade", l.done.Load(), longest[0], longest[1])
}

// vhostArgs are the arguments that connect to a subsystem for virtual machines.
func (s *site) vhostArgs(nqn string, more ...string) []string {
	return append([]string{"connect", "-a", s.addr.String(), "-n", nqn, "-q", "nqn.2026-01.org.example:host", "-i", "1",
		"--provider", "roce", "--frontend", "vhost-user-blk", "-k", "2", "-c", "1"}, more...)
}

// TestVhostDisconnect gives up a dead server and its socket.
func TestVhostDisconnect(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:vm-dead"
	s := newSite(t, nqn)
	s.put(nqn, newDisk(""))
	if err := s.run(s.vhostArgs(nqn)...); err != nil {
		t.Fatal(err)
	}
	r := s.record(nqn)
	path := r.Devices[0].Socket
	if r.Devices[0].Kind != state.VhostUserBlk || path == "" {
		t.Fatalf("on record: %+v", r.Devices)
	}
	s.kill(r)
	if err := s.run("gc"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("gc has removed a socket that a front end may wait for: %v", err)
	}
	if err := s.run("disconnect", "-d", path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket remains: %v", err)
	}
}
