package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
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
	target := state.Target{Address: remote[0], NQN: o.NQN, HostNQN: o.HostNQN}
	e, err := state.Dir(dir).Reserve(t.Context(), target, []string{"--nqn=" + o.NQN, "--nr-io-queues=1"}, true)
	if err != nil {
		t.Fatal(err)
	}
	e.Process.Start++ // another process's
	e.Phase, e.Controllers, e.KeepAlive = state.Live, controllers(3, 4), 60
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

// A socket is recovered where its clients look for it, once the controllers of the dead
// server have ended.
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
			if w.keepAlive != time.Minute {
				t.Errorf("the dead server's keep alive timeout was %v", w.keepAlive)
			}
			for _, want := range more {
				awaitDevice(t, r, want)
			}
			now, err := state.Dir(dir).Find(left.Name)
			if err != nil || !slices.Equal(now.Controllers, controllers(5)) || now.KeepAlive != 5 || len(now.Devices) != len(more) || now.Devices[0] != left.Devices[0] || slices.Equal(now.Args, left.Args) {
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

// TestUnheardTakeover takes over a socket, and nobody hears that it can be used. Its clients know it
// all the same, so the server stays. A server that made its socket itself ends.
func TestUnheardTakeover(t *testing.T) {
	unheard := func(r chan<- control.Status) func(*Config) {
		return func(c *Config) {
			c.Ready = func(s control.Status) error { r <- s; return unix.EPIPE }
		}
	}
	ready := make(chan control.Status, 1)
	w, o, dir := newWorld(), lab(), runDir(t)
	left := deadSocket(t, w, o, dir)
	r := beginWith(t, w, o, dir, unheard(ready))
	<-ready
	if s, err := r.client().Status(t.Context()); err != nil || s.Name != left.Name || len(s.Devices) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	r = beginWith(t, newWorld(), lab(), runDir(t), unheard(ready))
	<-ready
	if err := <-r.result; err == nil || !strings.Contains(err.Error(), unix.EPIPE.Error()) {
		t.Errorf("with a device of its own: %v", err)
	}
}

// TestAbandoned gives up a server that waits for the controllers of a dead one, and one that is
// ready.
func TestAbandoned(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	left := deadSocket(t, w, o, dir)
	w.connecting = make(chan struct{})
	abandoned := make(chan struct{})
	r := beginWith(t, w, o, dir, func(c *Config) { c.Abandoned = abandoned })
	<-w.connecting
	close(abandoned)
	if err := <-r.result; err == nil || err.Error() != ErrAbandoned.Error() {
		t.Errorf("not ready: %v", err)
	}
	if now, err := state.Dir(dir).Find(left.Name); err != nil || len(now.Devices) != 1 || !slices.Equal(now.Controllers, controllers(3, 4)) {
		t.Errorf("on record %+v, %v", now, err)
	}
	abandoned = make(chan struct{})
	r = beginWith(t, newWorld(), lab(), runDir(t), func(c *Config) { c.Abandoned = abandoned })
	r.waitReady()
	close(abandoned)
	if _, err := r.client().Status(t.Context()); err != nil {
		t.Errorf("ready: %v", err)
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

func init() { namespaceWait = 300 * time.Millisecond }

// A namespace that comes after the target's port is waited for.
func TestWaitsForNamespace(t *testing.T) {
	namespaceWait = 20 * time.Second
	t.Cleanup(func() { namespaceWait = 300 * time.Millisecond }) // after the server's end
	w, o, dir := newWorld(), lab(), runDir(t)
	deadUblk(t, w, o, dir)
	w.nsids = nil
	r := begin(t, w, o, dir)
	for !slices.Contains(w.happened(), "outlive [3 4]") {
		time.Sleep(time.Millisecond)
	}
	w.changed(w.namespace(7), initiator.Added)
	w.changed(w.namespace(1), initiator.Added)
	if s := r.waitReady(); len(s.Devices) != 1 || s.Devices[0].Device != "ublkb4" {
		t.Errorf("%+v", s.Devices)
	}
	awaitDevice(t, r, 7)
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
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
		"no UUID":      {func(n *namespace) { n.uuid = "" }, "has no identifier in common"},
		"NGUID only":   {func(n *namespace) { n.uuid, n.nguid = "", "ff" }, "has no identifier in common"},
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
				if got := w.happened(); !slices.Equal(got, []string{"loop", "connect", "outlive [3 4]", "close controller"}) {
					t.Errorf("happened: %q", got)
				}
				now, err := state.Dir(dir).Find(left.Name)
				if err != nil || len(now.Controllers) > 0 || !slices.Equal(now.Devices, left.Devices) || !slices.Equal(now.Args, left.Args) || now.Listen != left.Listen {
					t.Errorf("on record %+v, %v, was %+v", now, err, left)
				}
				if _, err := net.Dial("unix", filepath.Join(dir, "of-old.sock")); err == nil {
					t.Error("clients are served")
				}
			})
		}
	}
}

// What tells whether a namespace is the one that is on record.
func TestSameNamespace(t *testing.T) {
	of := func(uuid, nguid, eui64 string) namespace {
		return namespace{nsid: 1, uuid: uuid, nguid: nguid, eui64: eui64, device: disk{nsid: 1}}
	}
	for _, tt := range []struct {
		name     string
		was, now namespace
		old      bool // the record is of an older version
		same     bool
	}{
		{"all equal", of("a", "b", "c"), of("a", "b", "c"), false, true},
		{"one equal, one new", of("a", "", ""), of("a", "b", ""), false, true},
		{"one equal, one gone", of("a", "b", ""), of("", "b", ""), false, true},
		{"one equal, one not", of("a", "b", ""), of("a", "x", ""), false, false},
		{"none in common", of("a", "", ""), of("", "b", ""), false, false},
		{"none any more", of("a", "", ""), of("", "", ""), false, false},
		{"none before", of("", "", ""), of("a", "", ""), false, false},
		{"none at all", of("", "", ""), of("", "", ""), false, true},
		{"an old record", of("a", "", ""), of("a", "b", ""), true, true},
		{"an old record, another", of("a", "", ""), of("x", "b", ""), true, false},
		{"an old record, no UUID now", of("a", "", ""), of("", "b", ""), true, false},
		{"an old record without", of("", "", ""), of("", "b", ""), true, true},
	} {
		record := describeRecord(tt.was, state.Device{})
		if tt.old {
			record.Told = state.Told{}
		}
		if err := sameNamespace(record, tt.now); (err == nil) != tt.same {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	bare := of("", "", "")
	other := bare
	other.device = disk{nsid: 2}
	if err := sameNamespace(describeRecord(bare, state.Device{}), other); err == nil {
		t.Error("without identifiers, another size is the same namespace")
	}
}

// A socket that is on no record is not taken from whoever waits there, and with a record
// that cannot be read no address is known to be free.
func TestSocketsOfOthers(t *testing.T) {
	dir := runDir(t)
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	o := lab()
	o.Frontend, o.Socket = options.NBDSocket, path
	r := begin(t, newWorld(), o, dir)
	if err := <-r.result; exit.Of(err) != exit.DeviceTaken || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("while somebody listens: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	r = begin(t, newWorld(), o, dir)
	if err := <-r.result; exit.Of(err) != exit.DeviceTaken || !strings.Contains(err.Error(), "no record") {
		t.Errorf("with a dead socket: %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket was taken: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	unreadable := filepath.Join(dir, "ctrl7")
	if err := os.Mkdir(unreadable, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(unreadable, "state.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	r = begin(t, newWorld(), o, dir)
	if err := <-r.result; err == nil || !strings.Contains(err.Error(), "ctrl7") {
		t.Errorf("with an unreadable record: %v", err)
	}
}

// TestConnectAfterGivenUp: the error of a connect to a target whose controller was given
// up names the way out.
func TestConnectAfterGivenUp(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	r := begin(t, w, lab(), dir)
	r.waitReady()
	second := begin(t, newWorld(), lab(), dir)
	if err := <-second.result; exit.Of(err) != exit.AlreadyServed || !strings.Contains(err.Error(), "--duplicate-connect") {
		t.Errorf("while it is served: %v", err)
	}
	w.sub.lose(errors.New("given up after 12s"))
	second = begin(t, newWorld(), lab(), dir)
	err := <-second.result
	if exit.Of(err) != exit.AlreadyServed || !strings.Contains(err.Error(), "given up after 12s") || !strings.Contains(err.Error(), "disconnect ctrl0") {
		t.Errorf("after it was given up: %v", err)
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
	if err := w.connected.Associated([]initiator.ControllerID{{CNTLID: 6}}); err == nil {
		t.Error("a controller that is not on record may be used")
	}
	if got := onRecord(t, dir); !slices.Equal(got, controllers(5)) {
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
	if err != nil || len(records) != 1 || len(records[0].Devices) != 2 || records[0].Devices[1].NSID != 2 || !slices.Equal(records[0].Controllers, controllers(5)) {
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

// Records of older versions say where the server listens in the addresses of the
// devices only.
func TestListensAt(t *testing.T) {
	for _, at := range []net.Addr{
		&net.UnixAddr{Name: "/run/nbd.sock", Net: "unix"},
		&net.UnixAddr{Name: "/a b/c+d&e=%f#", Net: "unix"},
		&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809},
		&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 1},
	} {
		uri := exportURI(at, "7", false)
		if got := listensAt(state.State{Devices: []state.Device{{Kind: state.NBDSocket, URI: uri}}}); got != at.String() {
			t.Errorf("%s is at %s, want %v", uri, got, at)
		}
	}
}

// A name with several addresses means the target that is on record.
func TestAddressOnRecord(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	first, second := netip.MustParseAddrPort("127.0.0.9:4420"), netip.MustParseAddrPort("127.0.0.1:4420") // the one of lab
	s := &server{cfg: Config{Dir: state.Dir(dir)}, opts: o, back: w.backend()}
	if got, err := s.address([]netip.AddrPort{first, second}); got != first || err != nil {
		t.Errorf("%v, %v, want the first", got, err)
	}
	dead(t, o, dir, func(*state.Entry) {})
	if got, err := s.address([]netip.AddrPort{first, second}); got != second || err != nil {
		t.Errorf("%v, %v, want the one on record", got, err)
	}
}

func TestSameAddress(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if !sameAddress(filepath.Join(dir, "s"), filepath.Join(dir, "link", "s")) {
		t.Error("a link makes another address of it")
	}
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

// The wait for the controllers of a dead server is limited by their keep alive timeout,
// which may be longer than the time limit for connecting, or by the time limit for
// everything if there is one. It is announced.
func TestLimitOfTheWaitForOldControllers(t *testing.T) {
	needRings(t)
	for _, tt := range []struct {
		within, want time.Duration
	}{{0, 6*time.Minute + outliveMargin}, {30 * time.Second, 30 * time.Second}} {
		w, o, dir := newWorld(), lab(), runDir(t)
		left := deadSocket(t, w, o, dir) // its keep alive timeout is a minute
		ctx, cancel := context.WithCancel(t.Context())
		var waits []Wait
		err := run(ctx, Config{
			Options: o, Dir: state.Dir(dir), Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Recovers: left.Name, Within: tt.within,
			Waiting: func(w Wait) { waits = append(waits, w) },
			Ready:   func(control.Status) error { cancel(); return nil },
		}, w.backend())
		if err != nil {
			t.Error(err)
		}
		if w.outliveLimit > tt.want || w.outliveLimit < tt.want-o.Timeout {
			t.Errorf("within %v: waited up to %v, want %v", tt.within, w.outliveLimit, tt.want)
		}
		if len(waits) != 2 || waits[1] != (Wait{}) || !strings.Contains(waits[0].For, "waits until the target has ended the controllers of the earlier server, made at 127.0.0.1:4420") ||
			time.Duration(waits[0].Seconds)*time.Second > tt.want || waits[0].Seconds == 0 {
			t.Errorf("within %v: announced %+v", tt.within, waits)
		}
	}
}
