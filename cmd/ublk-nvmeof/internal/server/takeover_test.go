package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/ublk"
)

// dead leaves the record of a server that is no more.
func dead(t *testing.T, o *options.Connect, dir string, change func(*state.Entry)) state.Record {
	t.Helper()
	remote, err := o.Resolve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	target := state.Target{Address: remote, NQN: o.NQN, HostNQN: o.HostNQN}
	e, err := state.Dir(dir).Reserve(t.Context(), target, []string{"--nqn=" + o.NQN, "--nr-io-queues=1"}, true)
	if err != nil {
		t.Fatal(err)
	}
	e.Process.Start++ // another process's
	e.Phase, e.Controllers = state.Live, []uint16{3, 4}
	change(e)
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	return e.Record
}

// deadSocket leaves one with namespace 1 on a socket.
func deadSocket(t *testing.T, w *world, o *options.Connect, dir string) state.Record {
	t.Helper()
	path := filepath.Join(dir, "of-old.sock")
	return dead(t, o, dir, func(e *state.Entry) {
		e.Listen = path
		e.Devices = []state.Device{w.described(1, state.Device{Kind: state.NBDSocket, URI: "nbd+unix:///1?socket=" + path})}
	})
}

// deadUblk leaves one with namespace 1 on /dev/ublkb4, which waits.
func deadUblk(t *testing.T, w *world, o *options.Connect, dir string) state.Record {
	t.Helper()
	w.left[4] = ublk.Info{ID: 4, Cookie: 1004, State: ublk.Quiesced, Queues: 1, Depth: 64, MaxIO: 65536}
	return dead(t, o, dir, func(e *state.Entry) {
		e.Devices = []state.Device{w.described(1, state.Device{ID: 4, Cookie: 1004})}
	})
}

// A socket is served on where its clients look for it, once the dead server's
// controllers have ended.
func TestTakesOverSocket(t *testing.T) {
	for name, more := range map[string][]uint32{"the same namespaces": {1}, "one more": {1, 2}} {
		t.Run(name, func(t *testing.T) {
			w, o, dir := newWorld(), lab(), runDir(t)
			left := deadSocket(t, w, o, dir)
			w.nsids = more
			r := begin(t, w, o, dir)
			s := r.waitReady()
			if s.Name != left.Name || s.Frontend != options.NBDSocket || len(s.Devices) != 1 || s.Devices[0].Path() != left.Devices[0].URI {
				t.Errorf("%+v", s)
			}
			if got := w.happened(); !slices.Equal(got, []string{"loop", "connect", "outlive [3 4]"}) {
				t.Errorf("happened: %q", got)
			}
			for _, want := range more {
				awaitDevice(t, r, want)
			}
			now, err := state.Dir(dir).Find(left.Name)
			if err != nil || !slices.Equal(now.Controllers, []uint16{5}) || len(now.Devices) != len(more) || now.Devices[0] != left.Devices[0] || slices.Equal(now.Args, left.Args) {
				t.Errorf("on record %+v, %v", now, err)
			}
			r.stop()
			if err := <-r.result; err != nil {
				t.Error(err)
			}
			leaves(t, dir)
		})
	}
}

// awaitDevice waits until a namespace has a device.
func awaitDevice(t *testing.T, r *running, nsid uint32) {
	t.Helper()
	for {
		s, err := r.client().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range s.Devices {
			if d.NSID == nsid {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// A namespace that is not the one that a device was made for is not served to its
// users, of whatever front end. Nothing is touched, and the record stays.
func TestTakesOverNothingElse(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*namespace)
		want   string
	}{
		"UUID":         {func(n *namespace) { n.uuid = "other" }, "had UUID uuid-1 and has other now"},
		"no UUID":      {func(n *namespace) { n.uuid = "" }, "had UUID uuid-1 and has none now"},
		"NGUID":        {func(n *namespace) { n.nguid = "ff" }, "had no NGUID and has ff now"},
		"EUI64":        {func(n *namespace) { n.eui64 = "ee" }, "had no EUI64 and has ee now"},
		"block size":   {func(n *namespace) { n.device = disk{nsid: 1, block: 4096} }, "had blocks of 512 bytes and has 4096 now"},
		"another NSID": {func(n *namespace) { n.nsid = 9 }, "not namespace 1"},
	} {
		for kind, die := range map[string]func(*testing.T, *world, *options.Connect, string) state.Record{"ublk": deadUblk, "socket": deadSocket} {
			t.Run(name+" "+kind, func(t *testing.T) {
				w, o, dir := newWorld(), lab(), runDir(t)
				left := die(t, w, o, dir)
				w.change = tt.change
				r := begin(t, w, o, dir)
				if err := <-r.result; err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), left.Devices[0].Path()) {
					t.Errorf("%v, want %q", err, tt.want)
				}
				if got := w.happened(); !slices.Equal(got, []string{"loop", "connect", "outlive [3 4]"}) {
					t.Errorf("happened: %q", got)
				}
				now, err := state.Dir(dir).Find(left.Name)
				if err != nil || !slices.Equal(now.Devices, left.Devices) || !slices.Equal(now.Args, left.Args) || now.Listen != left.Listen {
					t.Errorf("on record %+v, %v, was %+v", now, err, left)
				}
				if _, err := net.Dial("unix", filepath.Join(dir, "of-old.sock")); err == nil {
					t.Error("clients are served")
				}
			})
		}
	}
}

// keeper is a disk that keeps to what users were told, or does not.
type keeper struct {
	disk
	told block.Geometry
	err  error
}

func (k *keeper) Promise(told block.Geometry) error {
	k.told = told
	return k.err
}

// What users of a block device were told holds for them: above all that there is no
// cache which they would have to flush.
func TestKeepPromises(t *testing.T) {
	dry := describeRecord(namespace{device: disk{nsid: 1, dry: true}}, state.Device{NSID: 1})
	socket, old := dry, dry
	socket.Kind, socket.URI, old.Told = state.NBDSocket, "nbd://x/1", state.Told{}
	nbdDevice := dry
	nbdDevice.Kind = state.NBD
	cached := disk{nsid: 1}
	for name, tt := range map[string]struct {
		device state.Device
		now    block.Device
		want   string
	}{
		"no cache":                    {dry, disk{nsid: 1, dry: true}, ""},
		"a cache now":                 {dry, cached, "volatile write cache"},
		"a cache now, nbd":            {nbdDevice, cached, "volatile write cache"},
		"a cache, and a client anew":  {socket, cached, ""},
		"a cache, and it is not told": {old, cached, ""},
		"a cache before":              {describeRecord(namespace{device: cached}, state.Device{NSID: 1}), disk{nsid: 1, dry: true}, ""},
		"kept":                        {dry, &keeper{disk: cached}, ""},
		"not kept":                    {dry, &keeper{disk: cached, err: errors.New("cannot flush")}, "cannot flush"},
	} {
		err := keepPromises(tt.device, namespace{nsid: 1, device: tt.now})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if k, ok := tt.now.(*keeper); ok && (k.told.VolatileCache || k.told.Sectors != 2048 || k.told.LogicalBlock != 512 || k.told.MaxIO != 1<<20) {
			t.Errorf("%s: told %+v", name, k.told)
		}
	}
}

// Records of older versions have the UUID only.
func TestSameNamespaceOfOldRecord(t *testing.T) {
	ns := namespace{nsid: 1, uuid: "a", nguid: "b", eui64: "c", device: disk{nsid: 1, block: 4096}}
	for uuid, same := range map[string]bool{"a": true, "": true, "x": false} {
		if err := sameNamespace(state.Device{NSID: 1, UUID: uuid}, ns); (err == nil) != same {
			t.Errorf("UUID %q: %v", uuid, err)
		}
	}
	// Without any identifier only the size tells.
	bare := namespace{nsid: 1, device: disk{nsid: 1}}
	record := describeRecord(bare, state.Device{})
	if err := sameNamespace(record, bare); err != nil {
		t.Error(err)
	}
	if err := sameNamespace(record, namespace{nsid: 1, device: disk{nsid: 2}}); err == nil {
		t.Error("another size is the same namespace")
	}
}

// Device numbers that are on record of a dead server are not given to others.
func TestNumbersAreKept(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	other := lab()
	other.NQN = "nqn.other"
	left := dead(t, other, dir, func(e *state.Entry) {
		e.Devices = []state.Device{{ID: 0, Cookie: 1, NSID: 1}, {ID: 2, Cookie: 2, NSID: 2}, {Kind: state.NBD, ID: 1, NSID: 3}}
	})
	o := lab()
	o.Device = 2
	r := begin(t, w, o, dir)
	if err := <-r.result; exit.Of(err) != exit.DeviceTaken || !strings.Contains(err.Error(), left.Name) || !strings.Contains(err.Error(), other.NQN) {
		t.Errorf("%v (%d)", err, exit.Of(err))
	}
	w = newWorld()
	w.nsids = []uint32{1, 2}
	r = begin(t, w, lab(), dir)
	if s := r.waitReady(); len(s.Devices) != 2 || s.Devices[0].Device != "ublkb1" || s.Devices[1].Device != "ublkb3" {
		t.Errorf("%+v", s.Devices)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if now, err := state.Dir(dir).Find(left.Name); err != nil || !slices.Equal(now.Devices, left.Devices) {
		t.Errorf("%+v, %v", now, err)
	}
}

// An upgrade that fails leaves the server that runs, and its record, as they are,
// though it has no device.
func TestUpgradeFails(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	left := dead(t, o, dir, func(e *state.Entry) { e.Process.Start-- }) // it lives
	w.connectErr = errors.New("no target")
	needRings(t)
	err := run(t.Context(), Config{Options: o, Dir: state.Dir(dir), Log: slog.New(slog.DiscardHandler), Succeeds: left.Name}, w.backend())
	if err == nil || !strings.Contains(err.Error(), "no target") {
		t.Error(err)
	}
	if now, err := state.Dir(dir).Find(left.Name); err != nil || !now.Alive || !slices.Equal(now.Args, left.Args) || !slices.Equal(now.Controllers, left.Controllers) {
		t.Errorf("%+v, %v", now, err)
	}
}

// A device that cannot be put on record is not there.
func TestRecordFull(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	r := begin(t, w, lab(), dir)
	r.waitReady()
	blocked := filepath.Join(dir, "ctrl0", "state.json.new")
	if err := os.MkdirAll(filepath.Join(blocked, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := w.connected.Associated(6); err == nil {
		t.Error("a controller that is not on record may be used")
	}
	if got := onRecord(t, dir); !slices.Equal(got, []uint16{5}) {
		t.Errorf("on record: %v", got)
	}
	w.changed(w.namespace(2), initiator.Added)
	for !slices.Contains(w.happened(), "stop ublkb1") {
		time.Sleep(time.Millisecond)
	}
	if err := os.RemoveAll(blocked); err != nil {
		t.Fatal(err)
	}
	awaitDevice(t, r, 2)
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 || len(records[0].Devices) != 2 || records[0].Devices[1].NSID != 2 || !slices.Equal(records[0].Controllers, []uint16{5, 6}) {
		t.Errorf("on record: %+v, %v", records, err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
}

// gc keeps what a socket's clients may wait for.
func TestCollectSocket(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	left := deadSocket(t, w, lab(), dir)
	b := w.backend()
	b.list = func(context.Context) ([]ublk.Info, error) { return nil, ublk.ErrNoDriver }
	found, err := b.collect(t.Context(), state.Dir(dir))
	if err != nil || len(found) != 1 || found[0].What != left.Name || found[0].Remove || !strings.Contains(found[0].Why, left.Devices[0].URI) {
		t.Errorf("%+v, %v", found, err)
	}
	if done, err := state.Dir(dir).Clear(t.Context(), left.Name, b.reap(slog.New(slog.DiscardHandler), Keep)); done || err != nil {
		t.Errorf("cleared: %t, %v", done, err)
	}
	if done, err := state.Dir(dir).Clear(t.Context(), left.Name, b.reap(slog.New(slog.DiscardHandler), EndUnused)); !done || err != nil {
		t.Errorf("disconnected: %t, %v", done, err)
	}
	leaves(t, dir, ".controllers.json")
}

func TestURI(t *testing.T) {
	for _, tt := range []struct {
		at     net.Addr
		secure bool
		want   string
	}{
		{&net.UnixAddr{Name: "/run/nbd.sock", Net: "unix"}, false, "nbd+unix:///7?socket=/run/nbd.sock"},
		{&net.UnixAddr{Name: "/a b/c+d&e=%f#", Net: "unix"}, true, "nbds+unix:///7?socket=/a%20b/c%2Bd%26e%3D%25f%23"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, false, "nbd://127.0.0.1:10809/7"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 1}, true, "nbds://[fe80::1%25eth0]:1/7"},
	} {
		got := uri(tt.at, "7", tt.secure)
		if got != tt.want {
			t.Errorf("%v: %s, want %s", tt.at, got, tt.want)
		}
		if at := listensAt(state.State{Devices: []state.Device{{Kind: state.NBDSocket, URI: got}}}); at != tt.at.String() {
			t.Errorf("%s is at %s, want %v", got, at, tt.at)
		}
	}
}

func TestSameAddress(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"/a", "/a", true}, {"/a", "/b", false}, {"/a", "127.0.0.1:1", false},
		{"127.0.0.1:1", "127.0.0.1:1", true}, {"127.0.0.1:1", "127.0.0.1:2", false}, {"127.0.0.1:1", "127.0.0.2:1", false},
		{"[::]:1", "127.0.0.1:1", true}, {"0.0.0.0:1", "[::1]:1", true}, {"[::ffff:127.0.0.1]:1", "127.0.0.1:1", true},
	} {
		if sameAddress(tt.a, tt.b) != tt.same || sameAddress(tt.b, tt.a) != tt.same {
			t.Errorf("%s, %s: want %t", tt.a, tt.b, tt.same)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31mb\nc\x7fd\u009be ü\u2028\xff"); got != "a?[31mb?c?d?e ü??" {
		t.Errorf("%q", got)
	}
}
