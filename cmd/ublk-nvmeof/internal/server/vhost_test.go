package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/ublk"
	"ublk-nvmeof/vhost/vhosttest"
)

// guestAt connects a guest to a socket, and reads a sector.
func guestAt(t *testing.T, path string) *vhosttest.Guest {
	t.Helper()
	g, err := vhosttest.NewGuest(vhosttest.Config{Rings: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	if err := g.Connect(path); err != nil {
		t.Fatal(err)
	}
	readSector(t, g)
	return g
}

func readSector(t *testing.T, g *vhosttest.Guest) {
	t.Helper()
	for _, r := range g.Rings {
		if status, err := r.Do(0, vhosttest.In, 0, 512); err != nil || status != vhosttest.OK {
			t.Fatalf("ring %d: status %d, %v", r.Index, status, err)
		}
	}
}

// TestVhostUserBlk serves two namespaces on sockets of their own, and leaves nothing.
func TestVhostUserBlk(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	w.nsids, o.Frontend, o.VhostMode = []uint32{1, 7}, options.VhostUserBlk, 0o660
	r := begin(t, w, o, dir)
	s := r.waitReady()
	path := func(n string) string { return filepath.Join(dir, "vhost-"+n+"-23e2becd5a5238d9.sock") }
	if len(s.Devices) != 2 || s.Devices[1].Path() != path("7") || s.Frontend != options.VhostUserBlk || s.FrontendReason != "asked for" {
		t.Errorf("%+v", s)
	}
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 || len(records[0].Devices) != 2 || records[0].Devices[0].Path() != path("1") {
		t.Errorf("on record: %+v, %v", records, err)
	}
	if info, err := os.Stat(path("1")); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", info, err)
	}
	g := guestAt(t, path("7"))
	if s, err := r.client().Status(t.Context()); err != nil || s.Devices[0].User != "" || !strings.HasPrefix(s.Devices[1].User, "process ") {
		t.Errorf("status: %+v, %v", s, err)
	}
	if err := r.client().Disconnect(t.Context(), false); exit.Of(err) != exit.Busy || !strings.Contains(err.Error(), "by process") {
		t.Errorf("disconnect with a guest: %v", err)
	}
	readSector(t, g)
	if err := r.client().Disconnect(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if err := g.Conn.AwaitEnd(); err != nil {
		t.Errorf("the guest heard %v", err)
	}
	leaves(t, dir)
}

// TestVhostSocket serves namespaces at the paths that the user gave, but not at one that
// somebody else has.
func TestVhostSocket(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	sockets := t.TempDir()
	o.Frontend, o.VhostSocket = options.VhostUserBlk, filepath.Join(sockets, "disk{nsid}")
	taken := filepath.Join(sockets, "disk1")
	if err := os.WriteFile(taken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := begin(t, w, o, dir)
	if err := <-r.result; exit.Of(err) != exit.DeviceTaken || !strings.Contains(err.Error(), "exists and is not a socket") {
		t.Errorf("a path that is taken: %v", err)
	}
	leaves(t, dir)
	if err := os.Remove(taken); err != nil {
		t.Fatal(err)
	}
	r = begin(t, w, o, dir)
	if s := r.waitReady(); len(s.Devices) != 1 || s.Devices[0].Path() != taken {
		t.Errorf("%+v", s)
	}
	guestAt(t, taken)
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(taken); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
	leaves(t, dir)
}

// TestTakesOverVhost recovers a socket where its front end looks for it, once the
// controllers of the dead server have ended.
func TestTakesOverVhost(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	path := filepath.Join(dir, "of-old.sock")
	left := dead(t, o, dir, func(e *state.Entry) {
		e.Devices = []state.Device{w.described(1, state.Device{Kind: state.VhostUserBlk, Socket: path})}
	})
	w.nsids = []uint32{1, 2}
	r := begin(t, w, o, dir)
	s := r.waitReady()
	if s.Name != left.Name || s.Frontend != options.VhostUserBlk || len(s.Devices) != 1 || s.Devices[0].Path() != path {
		t.Errorf("%+v", s)
	}
	if got := w.happened(); !slices.Equal(got, []string{"loop", "connect", "outlive [3 4]"}) {
		t.Errorf("happened: %q", got)
	}
	guestAt(t, path)
	awaitDevice(t, r, 2)
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, dir)
}

// TestVhostOfDeadServer keeps the address of a dead server, until its record is given up.
func TestVhostOfDeadServer(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	path := filepath.Join(t.TempDir(), "s")
	other := lab()
	other.NQN = "nqn.other"
	left := dead(t, other, dir, func(e *state.Entry) {
		e.Devices = []state.Device{w.described(1, state.Device{Kind: state.VhostUserBlk, Socket: path})}
	})
	o.Frontend, o.VhostSocket = options.VhostUserBlk, path
	r := begin(t, w, o, dir)
	if err := <-r.result; exit.Of(err) != exit.DeviceTaken || !strings.Contains(err.Error(), left.Name) {
		t.Errorf("%v", err)
	}
	back := w.backend()
	back.list = func(context.Context) ([]ublk.Info, error) { return nil, nil }
	found, err := back.collect(t.Context(), state.Dir(dir))
	if err != nil || len(found) != 1 || found[0].Remove || !strings.Contains(found[0].Why, "clients may wait for "+path) {
		t.Errorf("gc: %+v, %v", found, err)
	}
}
