package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/vhost/vhosttest"
)

// memoryGuest is a guest with three memory regions or more, two rings that are busy all the time,
// and a third ring for the test. Their requests have data in all of the regions that stay.
type memoryGuest struct {
	*late
	load *guestLoad
	ring *vhosttest.Ring
	next uint64 // sector of the next write of the test
	slot int    // of the next module
	kept []*vhosttest.Module
}

const moduleSize = 2 << 20 // a huge page

func newMemoryGuest(t *testing.T, nqn string, slots, huge bool, flags ...string) *memoryGuest {
	t.Helper()
	m := &memoryGuest{late: newLate(t, nqn), next: 1024}
	path := filepath.Join(m.dir, "vm1.sock")
	args := append(m.vhostArgs(nqn), "--vhost-socket", filepath.Join(m.dir, "vm{nsid}.sock"), "-i", "2", "-k", "1")
	if err := m.run(append(args, flags...)...); err != nil {
		t.Fatal(err)
	}
	g, err := vhosttest.NewGuest(vhosttest.Config{Rings: 3, Data: 4096, Sealed: true, Ack: true, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	stays := m.module(huge)
	m.kept = []*vhosttest.Module{stays}
	if err := g.Plug(stays); err != nil {
		t.Fatal(err)
	}
	m.ring = g.Rings[2]
	m.load = &guestLoad{t: t, guest: g, path: path, end: make(chan struct{})}
	m.load.buffer = func(r *vhosttest.Ring, slot uint16) (uint64, []byte) {
		if slot%2 == 0 {
			return ownBuffer(r, slot)
		}
		at := (uint64(r.Index)*64 + uint64(slot)) * 4096
		return stays.Base + at, stays.Mem[at : at+4096]
	}
	m.load.begin(g.Rings[:2])
	t.Cleanup(m.disk.release) // before the end of the load, which may wait for the write
	return m
}

// module makes a memory module, which is not plugged in.
func (m *memoryGuest) module(huge bool) *vhosttest.Module {
	m.t.Helper()
	d, err := vhosttest.NewModule(m.slot, moduleSize, huge)
	if huge {
		testenv.Need(m.t, "hugepages", err)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = d.Close() }) // after the guest, which was begun later or was unplugged
	m.slot++
	return d
}

func (m *memoryGuest) plug(d *vhosttest.Module) {
	m.t.Helper()
	if err := m.load.guest.Plug(d); err != nil {
		m.t.Fatalf("add memory: %v", err)
	}
}

func (m *memoryGuest) unplug(d *vhosttest.Module) {
	m.t.Helper()
	if err := m.load.guest.Unplug(d); err != nil {
		m.t.Fatalf("remove memory: %v", err)
	}
}

// fill makes up the first page of a module, and returns the sector for it.
func (m *memoryGuest) fill(d *vhosttest.Module) (sector uint64) {
	sector = m.next
	m.next = 1024 + (m.next+8)%1024
	copy(d.Mem, bytes.Repeat(fmt.Appendf(nil, "%016d", sector), 4096/16))
	return sector
}

// complete waits for a request of the test.
func (m *memoryGuest) complete(slot uint16) {
	m.t.Helper()
	if got, status, err := m.ring.Wait(); err != nil || got != slot || status != vhosttest.OK {
		m.t.Fatalf("slot %d: status %d: %v", got, status, err)
	}
}

// submit starts a request with 4 KiB of data at an offset of a module.
func (m *memoryGuest) submit(slot uint16, kind uint32, sector uint64, d *vhosttest.Module, offset uint64) {
	m.ring.Submit(m.ring.PrepareAt(slot, kind, sector, d.Base+offset, 4096))
}

// readBack reads to the second page of a module what was written from the first.
func (m *memoryGuest) readBack(d *vhosttest.Module, sector uint64) {
	m.t.Helper()
	clear(d.Mem[4096:8192])
	m.submit(0, vhosttest.In, sector, d, 4096)
	m.complete(0)
	if !bytes.Equal(d.Mem[:4096], d.Mem[4096:8192]) {
		m.t.Fatalf("sector %d has %.16q, want %.16q", sector, d.Mem[4096:], d.Mem)
	}
}

// TestVhostMemory has a front end of the project's own change the memory of a guest that is busy:
// while requests are under way, while no path is there, and before a crash of the server.
func TestVhostMemory(t *testing.T) {
	for name, c := range map[string]struct {
		slots bool
		flags []string
	}{
		"table":                {false, nil},
		"modules":              {true, nil},
		"modules without copy": {true, []string{"--zero-copy"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMemoryGuest(t, "nqn.2026-01.org.example:memory", c.slots, false, c.flags...)
			m.changeUnderLoad()
			m.changeWithoutPath()
			m.crash()
			m.load.stop()
			m.checkLog()
		})
	}
}

// TestVhostHugePages does a part of it with huge pages.
func TestVhostHugePages(t *testing.T) {
	testenv.Need(t, "hugepages", reserveHugePages(t, 8))
	for name, flags := range map[string][]string{"copy": nil, "zero copy": {"--zero-copy"}} {
		t.Run(name, func(t *testing.T) {
			m := newMemoryGuest(t, "nqn.2026-01.org.example:huge", true, true, flags...)
			m.load.progress(200)
			m.load.stop()
			m.checkLog()
		})
	}
}

// reserveHugePages adds n huge pages to those that the machine keeps, until the end of the test.
func reserveHugePages(t *testing.T, n int) error {
	const file = "/proc/sys/vm/nr_hugepages"
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = os.WriteFile(file, text, 0) }) // where it was not allowed, nothing has changed
	return os.WriteFile(file, []byte(strconv.Itoa(before+n)), 0)
}

// changeUnderLoad adds memory, uses it and removes it, while the other rings are busy.
func (m *memoryGuest) changeUnderLoad() {
	m.t.Helper()
	d := m.module(false)
	for range 10 {
		m.plug(d)
		sector := m.fill(d)
		m.submit(0, vhosttest.Out, sector, d, 0)
		m.complete(0)
		m.readBack(d, sector)
		m.unplug(d)
		m.load.progress(20)
	}
}

// changeWithoutPath adds and removes memory while the path is away. A request with data in the new
// memory waits for the path.
func (m *memoryGuest) changeWithoutPath() {
	m.t.Helper()
	idle, d := m.module(false), m.module(false)
	m.plug(idle)
	m.cut()
	m.plug(d)
	sector := m.fill(d)
	m.submit(1, vhosttest.Out, sector, d, 0)
	m.unplug(idle)
	m.plug(idle)
	m.mend()
	m.complete(1)
	m.readBack(d, sector)
	m.unplug(idle)
	m.unplug(d)
	m.load.progress(100)
}

// crash kills the server while a write from added memory is at the target, and a later request is
// done. The next server executes the write again, which only the record of requests in flight tells.
func (m *memoryGuest) crash() {
	m.t.Helper()
	d := m.module(false)
	m.plug(d)
	m.kept = append(m.kept, d)
	sector := m.fill(d)
	held := m.disk.hold(string(d.Mem[:16]))
	m.submit(2, vhosttest.Out, sector, d, 0)
	testenv.Receive(m.t, held, "the write at the target")
	m.submit(3, vhosttest.GetID, 0, d, 8192) // the server answers it
	m.complete(3)
	connected := m.load.atNextConnection()
	r := m.record(m.nqn)
	m.kill(r)
	m.disk.release()
	if err := m.run("recover", r.Name); err != nil {
		m.t.Fatal(err)
	}
	testenv.Receive(m.t, connected, "the next connection")
	m.complete(2)
	m.readBack(d, sector)
	m.load.progress(100)
}

// checkLog compares the log of written pages with what reads have written, page by page.
func (m *memoryGuest) checkLog() {
	m.t.Helper()
	g, d := m.load.guest, m.kept[0]
	log, err := g.StartLog(m.slot)
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	log.Take()
	header, _ := m.ring.Slot(0)
	always := []uint64{(vhosttest.GuestBase + m.ring.Used) / 4096, (vhosttest.GuestBase + header) / 4096}
	check := func(what string, kind uint32, at uint64, n uint32, pages ...uint64) {
		m.t.Helper()
		m.ring.Submit(m.ring.PrepareAt(0, kind, 0, at, n))
		m.complete(0)
		want := slices.Compact(slices.Sorted(slices.Values(append(pages, always...))))
		if got := log.Take(); !slices.Equal(got, want) {
			m.t.Errorf("%s: the log has pages %x, want %x", what, got, want)
		}
	}
	first := d.Base / 4096
	check("read of a page", vhosttest.In, d.Base+17*4096, 4096, first+17)
	check("read into parts of pages", vhosttest.In, d.Base+31*4096+512, 8192, first+31, first+32, first+33)
	check("read up to the end of a region", vhosttest.In, d.Base+moduleSize-512, 512, first+moduleSize/4096-1)
	check("read to the ends of words of the log", vhosttest.In, d.Base+63*4096, 3*4096, first+63, first+64, first+65)
	check("write", vhosttest.Out, d.Base+17*4096, 8192)
	check("flush", vhosttest.Flush, 0, 0)
	if err := g.StopLog(); err != nil {
		m.t.Fatal(err)
	}
	always = nil
	check("read after the end", vhosttest.In, d.Base, 4096)
}
