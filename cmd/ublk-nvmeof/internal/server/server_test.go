package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/ublk"
)

const requireRing = "io_uring"

// running is a server under test.
type running struct {
	t      *testing.T
	world  *world
	dir    string
	socket string
	stop   context.CancelFunc // as a signal does
	hurry  chan struct{}
	ready  chan control.Status
	result chan error
}

func lab() *options.Connect {
	o := options.Default()
	o.Address, o.NQN, o.HostNQN, o.HostID = "127.0.0.1", "nqn.lab", "nqn.host", nvme.NewUUID()
	o.Queues = poller.Request{IO: 1, Write: 1, Poll: 1}
	o.Timeout = 20 * time.Second
	return o
}

func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "run") // t.TempDir may be longer than a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// begin runs a server. Its end is waited for.
func begin(t *testing.T, w *world, o *options.Connect, dir string) *running {
	t.Helper()
	return beginWith(t, w, o, dir, func(*Config) {})
}

// beginWith runs a server with a changed configuration.
func beginWith(t *testing.T, w *world, o *options.Connect, dir string, change func(*Config)) *running {
	t.Helper()
	needRings(t)
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{
		t: t, world: w, dir: dir, stop: cancel, hurry: make(chan struct{}),
		ready: make(chan control.Status, 1), result: make(chan error, 1),
	}
	reserved := make(chan string, 1)
	cfg := Config{
		Options: o, Args: []string{"--nqn=" + o.NQN}, Dir: state.Dir(dir), Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Reserved: func(e *state.Entry) error { reserved <- e.Socket(); return nil },
		Ready:    func(s control.Status) error { r.ready <- s; return nil },
		Hurry:    r.hurry,
	}
	change(&cfg)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.result <- run(ctx, cfg, w.backend())
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	select {
	case r.socket = <-reserved:
	case <-ended:
	}
	return r
}

// needRings skips where io_uring may not be used: loops are real here.
func needRings(t *testing.T) {
	t.Helper()
	l, err := poller.New(poller.Config{})
	if err == nil {
		err = l.Stop()
	}
	testenv.Need(t, requireRing, err)
}

func (r *running) waitReady() control.Status {
	r.t.Helper()
	select {
	case s := <-r.ready:
		return s
	case err := <-r.result:
		r.t.Fatalf("ended: %v", err)
	}
	panic("unreachable")
}

func (r *running) client() *control.Client { return control.NewClient(r.socket) }

// wait returns what the server returned, and checks what happened after it was
// ready.
func (r *running) wait(want ...string) error {
	r.t.Helper()
	err := <-r.result
	events := r.world.happened()
	for i, e := range events {
		if strings.HasPrefix(e, "start") {
			events = events[i:]
			break
		}
	}
	events = slices.DeleteFunc(events, func(e string) bool { return strings.HasPrefix(e, "start") })
	if !slices.Equal(events, want) {
		r.t.Errorf("in the end: %q, want %q", events, want)
	}
	return err
}

func TestServe(t *testing.T) {
	w := newWorld()
	w.nsids = []uint32{1, 7}
	o := lab()
	o.QueueSize, o.MaxIO, o.TOS, o.DisableSQFlow = 32, 64<<10, 3, true
	r := begin(t, w, o, runDir(t))
	got := r.waitReady()

	if !slices.Equal(w.happened(), []string{"loop", "connect", "start ublkb0", "start ublkb1"}) {
		t.Errorf("order: %q", w.happened())
	}
	c := w.connected
	if c.Address.String() != "127.0.0.1:4420" || c.SubNQN != o.NQN || c.HostNQN != o.HostNQN || c.HostID != o.HostID ||
		c.Queues != o.Queues || len(c.Loops) != 1 || c.QueueSize != 32 || c.TOS != 3 || !c.DisableSQFlow ||
		c.KeepAlive != 5*time.Second || c.PollMaxBytes != 16<<10 ||
		c.ReconnectDelay != 10*time.Second || c.CtrlLoss != 600*time.Second || c.FastIOFail != 0 {
		t.Errorf("initiator got %+v", c)
	}
	// The queue size that the target granted, not the one asked for; only the
	// first device moves the loops.
	for i, u := range w.started {
		if u.ID != -1 || u.Depth != 64 || u.MaxIO != 64<<10 || u.Recovery != ublk.RecoveryRequeue || u.KeepAffinity != (i > 0) || len(u.Loops) != 1 {
			t.Errorf("ublk got %+v", u)
		}
	}
	want := control.Status{
		SchemaVersion: 1, Name: "ctrl0", PID: os.Getpid(), Transport: "rdma", TrAddr: "127.0.0.1", TrSvcID: "4420",
		NQN: o.NQN, HostNQN: o.HostNQN, HostID: o.HostID.String(), State: "live", CNTLID: 5, Version: "2.1", Model: "M",
		Paths: []control.Path{{
			Path: "127.0.0.1", TrAddr: "127.0.0.1", TrSvcID: "4420", State: "live", CNTLID: 5, Provider: "verbs", RDMADevice: "rxe0",
			ANA: map[string]string{"1": "optimized"}, Vouched: []string{},
		}},
		Policy: "queue-depth", Fence: "auto",
		Frontend: "ublk", FrontendReason: "the ublk driver is there",
		Provider: "verbs", ProviderReason: "RDMA device rxe0 is on lo, which leads to 127.0.0.1", RDMADevice: "rxe0", Memory: "registered", InCapsule: 4096, SQFlow: true, QueueSize: 64,
		Queues: control.Queues{
			Requested: 3, Granted: 2,
			Read: control.Class{Requested: 1, Granted: 1, Mapped: "read"}, Default: control.Class{Requested: 1, Granted: 1, Mapped: "default"},
			Poll: control.Class{Requested: 1, Granted: 0, Mapped: "default"},
		},
		KeepAlive: 5, Reconnect: 10, Loss: 600, FastFail: -1, TOS: 3, PollMax: 16 << 10, BufferBytes: 2 * 64 * 64 << 10,
		Lanes:           []control.Lane{{Submitted: 3, Completed: 2}},
		RegisteredLimit: 1 << 30,
		Requests:        control.Requests{InFlight: 1, Held: 1, Oldest: 4},
		Outages:         control.Outages{Unavailable: 1.5, Losses: map[string]int{"keep_alive": 2}, Attempts: 3, Reconnects: 2},
		DurationBounds:  []float64{1e-05, 2e-05, 5e-05, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60},
		Stages: map[string]map[string]control.Durations{
			"queue": {}, "wire": {"write_zeroes": {Buckets: someBuckets[:], Sum: 1}}, "return": {},
		},
	}
	for i, nsid := range w.nsids {
		want.Devices = append(want.Devices, control.Device{
			Device: fmt.Sprintf("ublkb%d", i), NSID: nsid, UUID: fmt.Sprintf("uuid-%d", nsid), Size: uint64(nsid) << 20, BlockSize: 512, WriteCache: true,
			Queues: 1, QueueDepth: 64, MaxIO: 64 << 10, BufferBytes: 64 * 64 << 10, Counters: control.IO{Reads: 3, ReadBytes: 12288},
			Present: true, Durations: map[string]control.Durations{"read": {Buckets: someBuckets[:], Sum: 2}},
		})
	}
	// The loops are real, and count for themselves.
	ignoreLoops(&got)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("status\n%+v, want\n%+v", got, want)
	}
	again, err := r.client().Status(t.Context())
	ignoreLoops(&again)
	if err != nil || !reflect.DeepEqual(again, want) {
		t.Errorf("status by the socket: %v\n%+v", err, again)
	}
	records, err := state.Dir(r.dir).List()
	if err != nil || len(records) != 1 || records[0].Phase != state.Live || !records[0].Alive ||
		!slices.Equal(records[0].Devices, []state.Device{w.described(1, state.Device{ID: 0, Cookie: 1000}), w.described(7, state.Device{ID: 1, Cookie: 1001})}) ||
		records[0].Devices[1].UUID != "uuid-7" || records[0].Devices[1].Told != (state.Told{Size: 7 << 20, BlockSize: 512, MaxIO: 1 << 20, VolatileCache: true}) {
		t.Errorf("record: %+v, %v", records, err)
	}

	r.stop()
	err = <-r.result
	events := w.happened()[4:]
	slices.Sort(events[:min(2, len(events))]) // devices stop at the same time
	if err != nil || !slices.Equal(events, []string{"stop ublkb0", "stop ublkb1", "close controller"}) {
		t.Errorf("in the end: %q, %v", events, err)
	}
	leaves(t, r.dir)
}

func ignoreLoops(s *control.Status) {
	for i := range s.Lanes {
		s.Lanes[i] = control.Lane{Submitted: s.Lanes[i].Submitted, Completed: s.Lanes[i].Completed}
	}
}

// Whatever fails, what was made before is undone, and the code says the cause.
func TestStartFails(t *testing.T) {
	refused := func(s nvme.Status) error {
		return &initiator.StepError{Step: "connect admin queue", Err: initiator.ConnectStatus(s)}
	}
	for _, tt := range []struct {
		name string
		set  func(*world, *options.Connect)
		code exit.Code
		text string // in the message
		then []string
	}{
		{"address", func(_ *world, o *options.Connect) { o.Address = "name.invalid" }, exit.Unreachable, "name.invalid", nil},
		{"no ublk", func(w *world, o *options.Connect) {
			o.Frontend = options.Ublk
			w.ublkErr, w.missing, w.loadErr = ublk.ErrNoDriver, []string{"ublk_drv"}, errors.New("no such module")
		}, exit.NoUblk, "no such module", []string{"load ublk_drv"}},
		{"no ublk, not to be loaded", func(w *world, o *options.Connect) {
			w.ublkErr, w.missing, o.LoadModules, o.Frontend = ublk.ErrNoDriver, []string{"ublk_drv"}, "never", options.Ublk
		}, exit.NoUblk, "no ublk driver", nil},
		{"no permission", func(w *world, o *options.Connect) { w.ublkErr, o.Frontend = ublk.ErrPermission, options.Ublk }, exit.Permission, "no permission", nil},
		{"no RDMA at all", func(w *world, o *options.Connect) {
			w.route.RDMA, o.Provider = "", options.Verbs
			w.rdmaErr, w.missing, w.loadErr = rdma.ErrNoDevice, []string{"rdma_ucm", "ib_uverbs"}, errors.New("no such module")
		}, exit.NoRDMA, "no RDMA device on lo, which leads to 127.0.0.1:4420; ", []string{"load ib_uverbs", "load rdma_ucm"}},
		{"no RDMA library", func(w *world, _ *options.Connect) { w.rdmaErr = syscall.ENOENT }, exit.NoRDMA,
			"RDMA device rxe0 on lo, which leads to 127.0.0.1:4420, cannot be used", nil},
		{"no verbs in the build", func(w *world, o *options.Connect) { w.rdmaErr, o.Provider = rdma.ErrUnsupported, options.Verbs }, exit.NoRDMA,
			"this build has no verbs; want --provider roce", nil},
		{"RDMA not permitted", func(w *world, _ *options.Connect) { w.rdmaErr = syscall.EACCES }, exit.Permission, "permission denied", nil},
		{"no RDMA on the way", func(w *world, o *options.Connect) {
			w.route.RDMA, o.Provider = "", options.Verbs
			w.connectErr = &initiator.StepError{Step: "connect admin queue", Err: &rdma.StepError{Step: "resolve address", Err: rdma.ErrNoDevice}}
		}, exit.NoRDMA, "no RDMA device on lo", []string{"loop", "connect"}},
		{"nobody listens", func(w *world, _ *options.Connect) { w.connectErr = &rdma.RejectError{Reason: 8} }, exit.Rejected,
			"nobody listens at 127.0.0.1:4420", []string{"loop", "connect"}},
		{"host not allowed", func(w *world, _ *options.Connect) { w.connectErr = refused(nvme.StatusConnectInvalidHost) }, exit.HostNotAllowed,
			"subsystem nqn.lab at 127.0.0.1:4420 does not admit host nqn.host", []string{"loop", "connect"}},
		{"timeout", func(w *world, o *options.Connect) { w.connecting, o.Timeout = make(chan struct{}), 50*time.Millisecond }, exit.Timeout,
			"no answer from 127.0.0.1:4420 in time", []string{"loop", "connect"}},
		{"no namespace", func(w *world, _ *options.Connect) { w.nsids = nil }, exit.NotFound, "has no usable namespace", []string{"loop", "connect", "close controller"}},
		{"no usable namespace", func(w *world, _ *options.Connect) {
			w.nsids, w.leftOut = nil, map[uint32]string{7: "block size 1", 2: "it is empty"}
		}, exit.NotFound, "subsystem nqn.lab has no usable namespace; namespace 2: it is empty; namespace 7: block size 1", []string{"loop", "connect", "close controller"}},
		{"not this namespace", func(w *world, o *options.Connect) { w.nsids, o.NSIDs = []uint32{1, 2}, []uint32{2, 3} }, exit.NotFound,
			`--namespace "3": subsystem nqn.lab has only 1, 2`, []string{"loop", "connect", "close controller"}},
		{"device taken", func(w *world, o *options.Connect) { o.Device, w.startErr[1] = 4, ublk.ErrIDTaken }, exit.DeviceTaken,
			"namespace 1: ", []string{"loop", "connect", "close controller"}},
		{"second device taken", func(w *world, o *options.Connect) {
			w.nsids, o.Device, w.startErr[2] = []uint32{1, 2}, 4, ublk.ErrIDTaken
		}, exit.DeviceTaken, "namespace 2: ", []string{"loop", "connect", "start ublkb4", "stop ublkb4", "close controller"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, o, dir := newWorld(), lab(), runDir(t)
			tt.set(w, o)
			r := begin(t, w, o, dir)
			err := <-r.result
			if exit.Of(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.text) || strings.Contains(fmt.Sprint(err), "\n") {
				t.Errorf("%v (%d), want code %d and %q", err, exit.Of(err), tt.code, tt.text)
			}
			if got := w.happened(); !slices.Equal(got, tt.then) {
				t.Errorf("happened: %q, want %q", got, tt.then)
			}
			leaves(t, dir)
		})
	}
}

// Which provider --provider means, and what is said about it.
func TestProvider(t *testing.T) {
	for _, tt := range []struct {
		flag, rdmaDev string
		want          []string // tried
		reason        string
		loads         bool
	}{
		{options.AutoProvider, "rxe0", []string{"verbs"}, "RDMA device rxe0 is on lo, which leads to 127.0.0.1", true},
		{options.AutoProvider, "", []string{"roce"}, "no RDMA device is on lo, which leads to 127.0.0.1", false},
		{options.RoCE, "rxe0", []string{"roce"}, "asked for", false},
		{options.Verbs, "", []string{"verbs"}, "asked for", true},
	} {
		w, o := newWorld(), lab()
		o.Provider, w.route.RDMA, w.missing = tt.flag, tt.rdmaDev, []string{"rdma_ucm", "ib_uverbs"}
		r := begin(t, w, o, runDir(t))
		s := r.waitReady()
		last := tt.want[len(tt.want)-1]
		if !slices.Equal(w.provider, tt.want) || s.Provider != last || s.ProviderReason != tt.reason {
			t.Errorf("%+v: tried %q, %s, %s", tt, w.provider, s.Provider, s.ProviderReason)
		}
		if loaded := slices.Contains(w.happened(), "load ib_uverbs"); loaded != tt.loads {
			t.Errorf("%+v: modules loaded: %t", tt, loaded)
		}
		r.stop()
		then := []string{"stop ublkb0", "close controller"}
		if last == "roce" {
			then = append(then, "close provider")
		}
		if err := r.wait(then...); err != nil {
			t.Error(err)
		}
	}
}

func TestChosenNamespaces(t *testing.T) {
	w, o := newWorld(), lab()
	w.nsids, o.NSIDs, o.Device = []uint32{1, 2, 3}, []uint32{3, 1}, 10
	r := begin(t, w, o, runDir(t))
	s := r.waitReady()
	if len(s.Devices) != 2 || s.Devices[0].NSID != 3 || s.Devices[0].Device != "ublkb10" || s.Devices[1].NSID != 1 || s.Devices[1].Device != "ublkb11" {
		t.Errorf("%+v", s.Devices)
	}
}

func TestDuplicate(t *testing.T) {
	dir := runDir(t)
	first := begin(t, newWorld(), lab(), dir)
	first.waitReady()
	second := begin(t, newWorld(), lab(), dir)
	if err := <-second.result; exit.Of(err) != exit.AlreadyServed {
		t.Errorf("%v, want code %d", err, exit.AlreadyServed)
	}
	o := lab()
	o.Duplicate = true
	if s := begin(t, newWorld(), o, dir).waitReady(); s.Name != "ctrl1" {
		t.Errorf("%s", s.Name)
	}
}

func TestDisconnect(t *testing.T) {
	w := newWorld()
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	if err := r.client().Disconnect(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := r.wait("stop ublkb0", "close controller"); err != nil {
		t.Error(err)
	}
	leaves(t, r.dir)
}

// One device in use is enough, and nothing has changed then.
func TestDisconnectBusy(t *testing.T) {
	for _, nsids := range [][]uint32{{1}, {1, 2}} {
		w := newWorld()
		w.nsids = nsids
		w.busy[len(nsids)-1] = true
		r := begin(t, w, lab(), runDir(t))
		before := r.waitReady()
		if err := r.client().Disconnect(t.Context(), false); exit.Of(err) != exit.Busy {
			t.Fatalf("%v, want code %d", err, exit.Busy)
		}
		after, err := r.client().Status(t.Context())
		if err != nil || after.State != "live" || len(after.Devices) != len(before.Devices) {
			t.Errorf("afterwards: %+v, %v", after, err)
		}
		records, err := state.Dir(r.dir).List()
		if err != nil || len(records[0].Devices) != len(nsids) {
			t.Errorf("on record: %+v, %v", records, err)
		}
		if err := r.client().Disconnect(t.Context(), true); err != nil {
			t.Errorf("by force: %v", err)
		}
		if err := <-r.result; err != nil {
			t.Error(err)
		}
		leaves(t, r.dir)
	}
}

// Requests that do not come back are given up: after a while by themselves, at
// once on a second signal.
func TestStuckRequests(t *testing.T) {
	for name, end := range map[string]func(*running) error{
		"signals": func(r *running) error {
			r.stop()
			close(r.hurry)
			return nil
		},
		"force": func(r *running) error { return r.client().Disconnect(r.t.Context(), true) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.stuck[0] = true
			r := begin(t, w, lab(), runDir(t))
			r.waitReady()
			if err := end(r); err != nil {
				t.Error(err)
			}
			if err := r.wait("abort", "stop ublkb0", "close controller"); err != nil {
				t.Error(err)
			}
			leaves(t, r.dir, ".controllers.json") // the target may still have the requests
		})
	}
}

// A device that does not end at all does not keep the process. It stays on
// record, so that the next server clears it away, and what it needs stays.
func TestWedgedDevice(t *testing.T) {
	w := newWorld()
	w.nsids, w.stuck[1], w.wedged[1] = []uint32{1, 2}, true, true
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	if err := r.client().Disconnect(t.Context(), true); exit.Of(err) != exit.Timeout {
		t.Errorf("%v, want code %d", err, exit.Timeout)
	}
	if err := r.wait("stop ublkb0", "abort"); err != nil {
		t.Errorf("the end was asked for by somebody who was told: %v", err)
	}
	records, err := state.Dir(r.dir).List()
	if err != nil || len(records) != 1 || !slices.Equal(records[0].Devices, []state.Device{w.described(2, state.Device{ID: 1, Cookie: 1001})}) {
		t.Errorf("on record: %+v, %v", records, err)
	}
}

// A target that does not answer does not keep the process either.
func TestSilentTarget(t *testing.T) {
	w := newWorld()
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	w.sub.hang = true
	if err := r.client().Disconnect(t.Context(), true); err != nil {
		t.Error(err)
	}
	if err := r.wait("stop ublkb0", "close controller"); err != nil {
		t.Error(err)
	}
	leaves(t, r.dir, ".controllers.json") // it has not said that it has ended the controller
}

// While the controller is not connected, the status says why, and why the last attempt failed.
func TestFailureIsReported(t *testing.T) {
	var s control.Status
	describeState(&s, initiator.Info{Paths: []initiator.PathInfo{{Reason: errors.New("rain"), Failure: errors.New("still rain")}}})
	if s.Reason != "rain" || s.Failure != "still rain" {
		t.Errorf("reason %q, failure %q", s.Reason, s.Failure)
	}
}

// When the controller is lost, the devices stay and the status says why.
func TestLostController(t *testing.T) {
	w := newWorld()
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	w.sub.lose(errors.New("keep alive: rain"))
	s, err := r.client().Status(t.Context())
	if err != nil || s.State != "dead" || s.Reason != "keep alive: rain" || s.Model != "M" || s.Queues.Requested != 3 || len(s.Devices) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	r.stop()
	if err := r.wait("stop ublkb0", "close controller"); err != nil {
		t.Error(err)
	}
	leaves(t, r.dir, ".controllers.json") // the target may still have commands
	next := newWorld()
	r = begin(t, next, lab(), r.dir)
	r.waitReady()
	if got := next.happened(); !slices.Equal(got, []string{"loop", "connect", "outlive [5]", "start ublkb0"}) {
		t.Errorf("the next server: %q", got)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, r.dir)
}

// A server without devices has nothing to do.
func TestDevicesGone(t *testing.T) {
	w := newWorld()
	w.nsids = []uint32{1, 2}
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	w.devices[0].end(ublk.ErrStopped)
	s, err := r.client().Status(t.Context())
	if err != nil || len(s.Devices) != 1 || s.Devices[0].Device != "ublkb1" {
		t.Errorf("%+v, %v", s.Devices, err)
	}
	w.devices[1].end(ublk.ErrStopped)
	if err := r.wait("stop ublkb0", "stop ublkb1", "close controller"); err != nil {
		t.Error(err)
	}
	leaves(t, r.dir)
}

func TestInterruptedWhileConnecting(t *testing.T) {
	for name, interrupt := range map[string]func(*running) error{
		"signal":     func(r *running) error { r.stop(); return nil },
		"disconnect": func(r *running) error { return r.client().Disconnect(r.t.Context(), false) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.connecting = make(chan struct{})
			r := begin(t, w, lab(), runDir(t))
			<-w.connecting
			s, err := r.client().Status(t.Context())
			if err != nil || s.State != "connecting" {
				t.Errorf("%+v, %v", s, err)
			}
			if err := interrupt(r); err != nil {
				t.Error(err)
			}
			if err := <-r.result; exit.Of(err) != exit.Other {
				t.Errorf("%v, want code %d", err, exit.Other)
			}
			leaves(t, r.dir)
		})
	}
}

// Whoever was to hear of the devices is gone: nobody else knows of them.
func TestNobodyListens(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	needRings(t)
	err := run(t.Context(), Config{
		Options: lab(), Dir: state.Dir(dir), Log: slog.New(slog.DiscardHandler),
		Ready: func(control.Status) error { return syscall.EPIPE },
	}, w.backend())
	if !strings.Contains(fmt.Sprint(err), "broken pipe") {
		t.Error(err)
	}
	if got := w.happened(); got[len(got)-1] != "close controller" {
		t.Errorf("%q", got)
	}
	leaves(t, dir)
}

// What dead servers left: devices that nobody can use go, others stay, and what
// is somebody else's by now is not touched.
func TestReap(t *testing.T) {
	for _, tt := range []struct {
		name    string
		left    ublk.Info
		waiting Waiting
		gone    bool
		then    []string
	}{
		{"dead", ublk.Info{ID: 3, Cookie: 9, State: ublk.Dead}, Keep, true, []string{"remove 3"}},
		{"waits for a server", ublk.Info{ID: 3, Cookie: 9, State: ublk.Quiesced}, Keep, false, nil},
		{"waits in vain", ublk.Info{ID: 3, Cookie: 9, State: ublk.Quiesced}, EndUnused, true, []string{"abandon 3, force false"}},
		{"waits in vain, in use", ublk.Info{ID: 5, Cookie: 9, State: ublk.Quiesced}, EndUnused, false, []string{"abandon 5, force false"}},
		{"in use, by force", ublk.Info{ID: 5, Cookie: 9, State: ublk.FailIO}, EndAll, true, []string{"abandon 5, force true"}},
		{"live", ublk.Info{ID: 3, Cookie: 9, State: ublk.Live}, EndAll, false, nil},
		{"somebody else's", ublk.Info{ID: 3, Cookie: 10, State: ublk.Dead}, EndAll, true, nil},
		{"no such device", ublk.Info{ID: 4}, EndAll, true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			w.left[tt.left.ID] = tt.left
			w.busy[5] = true
			b := w.backend()
			r := state.Record{State: state.State{Devices: []state.Device{{ID: 3, Cookie: 9}}}}
			if tt.left.ID == 5 {
				r.Devices[0].ID = 5
			}
			if got, err := b.reap(slog.New(slog.DiscardHandler), tt.waiting)(t.Context(), r); got != tt.gone || err != nil {
				t.Errorf("gone: %t, %v", got, err)
			}
			if got := w.happened(); !slices.Equal(got, tt.then) {
				t.Errorf("happened: %q, want %q", got, tt.then)
			}
		})
	}
	b := newWorld().backend()
	b.get = func(context.Context, int) (ublk.Info, error) { return ublk.Info{}, ublk.ErrNoDriver }
	if gone, err := b.gone(t.Context(), state.Device{ID: 3, Cookie: 9}, Keep); !gone || err != nil {
		t.Errorf("without a driver there are no devices: %t, %v", gone, err)
	}
	b.get = func(context.Context, int) (ublk.Info, error) { return ublk.Info{}, syscall.EIO }
	if gone, err := b.gone(t.Context(), state.Device{ID: 3, Cookie: 9}, Keep); gone || err == nil {
		t.Errorf("an error is no proof: %t, %v", gone, err)
	}
}

func TestSocketIsGoneBeforeTheState(t *testing.T) {
	w := newWorld()
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	if _, err := os.Stat(filepath.Join(r.dir, "ctrl0", "control.sock")); err != nil {
		t.Error(err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if _, err := r.client().Status(t.Context()); !control.Gone(err) {
		t.Error(err)
	}
}

// died leaves the record of a server that is no more, with devices that wait for
// another, number 4 of namespace 1 and number 6 of namespace 2.
func died(t *testing.T, w *world, o *options.Connect, dir string) {
	t.Helper()
	w.nsids = []uint32{1, 2}
	remote, err := o.Resolve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	target := state.Target{Address: remote[0], NQN: o.NQN, HostNQN: o.HostNQN}
	e, err := state.Dir(dir).Reserve(t.Context(), target, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	e.Process.Start++ // another process's
	e.Devices = []state.Device{{ID: 4, Cookie: 1004, NSID: 1}, {ID: 6, Cookie: 1006, NSID: 2}}
	e.Controllers = controllers(3, 4)
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	for _, d := range e.Devices {
		w.left[d.ID] = ublk.Info{ID: d.ID, Cookie: d.Cookie, State: ublk.Quiesced, Queues: 1, Depth: 64, MaxIO: 65536}
	}
}

func TestTakesOver(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	died(t, w, lab(), dir)
	r := begin(t, w, lab(), dir)
	s := r.waitReady()
	if s.Name != "ctrl0" || len(s.Devices) != 2 || s.Devices[0].Device != "ublkb4" || s.Devices[1].Device != "ublkb6" {
		t.Errorf("%+v", s)
	}
	if got := onRecord(t, dir); !slices.Equal(got, controllers(5)) {
		t.Errorf("controllers %v on record", got)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	got := w.happened()
	if i, j := slices.Index(got, "outlive [3 4]"), slices.Index(got, "recover ublkb4"); i < 0 || i > j {
		t.Errorf("the old controllers were not waited for before: %q", got)
	}
	for _, want := range []string{"recover ublkb4", "recover ublkb6", "stop ublkb4", "stop ublkb6"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	leaves(t, dir)
}

// Devices follow their namespaces.
func TestNamespaces(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	w.nsids = []uint32{1, 2}
	r := begin(t, w, lab(), dir)
	r.waitReady()
	await := func(want string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !slices.Contains(w.happened(), want); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("no %q in %q", want, w.happened())
			}
		}
	}
	ns := func(id uint32) namespace { return namespace{nsid: id, device: disk{nsid: id}} }
	w.changed(ns(3), initiator.Added)
	await("start ublkb2")
	w.changed(ns(1), initiator.Resized)
	await("resize ublkb0 to 2048")
	w.changed(ns(1), initiator.WriteProtection)
	await("ublkb0 read-only false")
	// In use, and its namespace comes back: it stays. Not in use: it goes.
	w.setBusy(1, true)
	w.changed(ns(2), initiator.Removed)
	w.changed(ns(3), initiator.Removed)
	await("stop ublkb2")
	w.changed(ns(2), initiator.Added)
	w.changed(ns(1), initiator.WriteProtection) // and so all before it is done
	w.setBusy(1, false)
	w.changed(ns(3), initiator.Added)
	await("start ublkb3")
	// The last of them: the server stays, and so does what others may say.
	for id := range uint32(3) {
		w.changed(ns(id+1), initiator.Removed)
	}
	for _, want := range []string{"stop ublkb0", "stop ublkb1", "stop ublkb3"} {
		await(want)
	}
	w.changed(ns(4), initiator.Added)
	await("start ublkb4")
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, dir)
}

// A server that hands over ends, and leaves its devices and its record.
func TestHandOver(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	w.nsids = []uint32{1, 2}
	r := begin(t, w, lab(), dir)
	r.waitReady()
	if err := r.client().HandOver(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	got := w.happened()
	for _, want := range []string{"hand ublkb0 over", "hand ublkb1 over"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if i := slices.IndexFunc(got, func(e string) bool { return strings.HasPrefix(e, "stop") }); i >= 0 {
		t.Errorf("%q", got)
	}
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 || len(records[0].Devices) != 2 || !slices.Equal(records[0].Controllers, controllers(5)) {
		t.Errorf("on record: %+v, %v", records, err)
	}
}

// Devices that do not wait for another server are not handed over.
func TestHandOverRefused(t *testing.T) {
	w, dir, o := newWorld(), runDir(t), lab()
	o.OnCrash = options.Remove
	r := begin(t, w, o, dir)
	r.waitReady()
	if err := r.client().HandOver(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "--on-crash remove") {
		t.Errorf("%v", err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, dir)
}

// TestCollect: what is an orphan, and what is somebody's.
func TestCollect(t *testing.T) {
	const cookie = 0x4e564d65_00000001
	on := func(alive bool) []state.Record {
		return []state.Record{{State: state.State{Name: "ctrl0", Devices: []state.Device{{ID: 3, Cookie: cookie}}}, Alive: alive}}
	}
	for _, tt := range []struct {
		name    string
		device  ublk.Info
		records []state.Record
		said    bool
		remove  bool
	}{
		{"served", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Live}, on(true), false, false},
		{"server about to start it", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Dead}, on(true), false, false},
		{"live, of another run directory", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Live}, nil, false, false},
		{"waits for a server", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Quiesced}, on(false), true, false},
		{"waits, and nobody knows it", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Quiesced}, nil, true, true},
		{"its number is on record, but not it", ublk.Info{ID: 3, Cookie: cookie + 1, State: ublk.FailIO}, on(false), true, true},
		{"gone with its server", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Dead}, on(false), true, true},
		{"gone, and nobody knows it", ublk.Info{ID: 3, Cookie: cookie, State: ublk.Dead}, nil, true, true},
	} {
		if f, said := finding(tt.device, tt.records); said != tt.said || f.Remove != tt.remove {
			t.Errorf("%s: said %t, remove %t (%s)", tt.name, said, f.Remove, f.Why)
		}
	}
	// A record that cannot be read may be that of any device.
	unread := []state.Record{{State: state.State{Name: "ctrl3"}, Err: os.ErrInvalid}}
	if f, said := finding(ublk.Info{ID: 3, Cookie: cookie, State: ublk.Quiesced}, unread); !said || f.Remove || !strings.Contains(f.Why, "ctrl3") {
		t.Errorf("a record cannot be read: %+v", f)
	}
	// Devices of other programs are not looked at, dead servers' records go with
	// the last device, and what was there at one look only is left alone.
	b := newWorld().backend()
	b.list = func(context.Context) ([]ublk.Info, error) {
		return []ublk.Info{{ID: 1, Cookie: 7, State: ublk.Dead}, {ID: 3, Cookie: cookie, State: ublk.Dead}}, nil
	}
	dir := runDir(t)
	died(t, newWorld(), lab(), dir)
	found, err := b.collect(t.Context(), state.Dir(dir))
	if err != nil || len(found) != 2 || found[0].What != "/dev/ublkb3" || found[1].What != "ctrl0" || !found[0].Remove || !found[1].Remove {
		t.Fatalf("%+v, %v", found, err)
	}
	again := slices.Clone(found)
	again[0].info.Cookie++
	if got := both(found, again); got[0].Remove || !got[1].Remove {
		t.Errorf("%+v", got)
	}
}

// onRecord are the controllers of the one server on record.
func onRecord(t *testing.T, dir string) []state.Controller {
	t.Helper()
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	return records[0].Controllers
}

// A server that cannot take all over leaves all as it was, for the next.
func TestTakeOverFails(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(*world)
		want string
	}{
		"target":         {func(w *world) { w.connectErr = errors.New("no target") }, "no target"},
		"namespace gone": {func(w *world) { w.nsids = []uint32{1} }, "not namespace 2"},
		"second device":  {func(w *world) { w.startErr[2] = errors.New("no memory") }, "no memory"},
	} {
		t.Run(name, func(t *testing.T) {
			w, dir := newWorld(), runDir(t)
			died(t, w, lab(), dir)
			c.set(w)
			r := begin(t, w, lab(), dir)
			if err := <-r.result; err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if got := onRecord(t, dir); name == "target" && !slices.Equal(got, controllers(3, 4)) {
				t.Errorf("controllers %v on record, and those of the dead server may have commands", got)
			}
			for _, e := range w.happened() {
				if strings.HasPrefix(e, "stop") || strings.HasPrefix(e, "remove") || strings.HasPrefix(e, "abandon") {
					t.Errorf("happened: %s", e)
				}
			}
			records, err := state.Dir(dir).List()
			if err != nil || len(records) != 1 || len(records[0].Devices) != 2 {
				t.Errorf("left on record: %+v, %v", records, err)
			}
			for _, l := range r.world.devices {
				l.end(nil)
			}
		})
	}
}

// A device that went away with the server is no reason not to serve the others.
func TestTakesOverWhatIsThere(t *testing.T) {
	w, dir := newWorld(), runDir(t)
	died(t, w, lab(), dir)
	delete(w.left, 4)
	r := begin(t, w, lab(), dir)
	if s := r.waitReady(); len(s.Devices) != 1 || s.Devices[0].Device != "ublkb6" {
		t.Errorf("%+v", s)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, dir)
}

// A change that cannot be carried out is tried again until it can be, or until its
// namespace is gone.
func TestNamespacesRetry(t *testing.T) {
	w := newWorld()
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	w.failStart(2, errors.New("no memory"))
	w.failStart(3, errors.New("no memory"))
	for id := range uint32(2) {
		w.changed(w.namespace(id+2), initiator.Added)
	}
	time.Sleep(retryPause / 2)
	w.changed(w.namespace(3), initiator.Removed)
	w.failStart(2, nil)
	w.failStart(3, nil)
	awaitDevice(t, r, 2)
	s, err := r.client().Status(t.Context())
	if err != nil || len(s.Devices) != 2 || s.Devices[1].NSID != 2 {
		t.Errorf("%+v, %v", s.Devices, err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
}

// What others ask of the controller goes to it through the server, which says in words
// why it cannot.
func TestQueries(t *testing.T) {
	w := newWorld()
	w.change = func(ns *namespace) {
		ns.reserve = func(_ context.Context, _ *nvme.Command, data []byte) error {
			copy(data, "reserved")
			return w.queriesFail()
		}
	}
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	c := r.client()
	var cmd nvme.Command
	cmd.SetGetFeatures(nvme.FeatureKeepAlive)
	if a, err := c.Query(t.Context(), control.Query{Command: cmd[:], Length: 8}); err != nil || a.Result != nvme.FeatureKeepAlive || len(a.Data) != 8 || a.Data[7] != byte(nvme.AdminGetFeatures) {
		t.Errorf("%+v, %v", a, err)
	}
	for _, q := range []control.Query{{}, {Command: cmd[:63]}, {Command: cmd[:], Length: -1}, {Command: cmd[:], Length: initiator.MaxQuery + 1}} {
		if _, err := c.Query(t.Context(), q); exit.Of(err) != exit.Usage {
			t.Errorf("%d bytes, length %d: %v", len(q.Command), q.Length, err)
		}
	}
	if _, err := c.Reserve(t.Context(), control.Reservation{NSID: 9, Command: cmd[:]}); exit.Of(err) != exit.NotFound {
		t.Errorf("a namespace that is not served: %v", err)
	}
	if _, err := c.Reserve(t.Context(), control.Reservation{NSID: 1, Command: cmd[:5]}); exit.Of(err) != exit.Usage {
		t.Errorf("a short command: %v", err)
	}
	if data, err := c.Reserve(t.Context(), control.Reservation{NSID: 1, Command: cmd[:], Data: make([]byte, 8)}); err != nil || string(data) != "reserved" {
		t.Errorf("reservation: %q, %v", data, err)
	}
	if err := errors.Join(c.Reset(t.Context()), c.Rescan(t.Context())); err != nil {
		t.Error(err)
	}
	for _, tt := range []struct {
		err  error
		code exit.Code
		want string
	}{
		{&initiator.QueryError{Reason: "x"}, exit.Usage, "get features: not a query: x"},
		{initiator.ErrNotConnected, exit.Busy, "get features: the controller is not connected, it is live"},
		{nvme.StatusInvalidField | nvme.StatusDNR, exit.Negotiation, "get features: the target answered: nvme status 002h: invalid field"},
		{context.DeadlineExceeded, exit.Timeout, "get features: context deadline exceeded"},
	} {
		w.failQueries(tt.err)
		if _, err := c.Query(t.Context(), control.Query{Command: cmd[:]}); exit.Of(err) != tt.code || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("code %d, %v, want %d, %s", exit.Of(err), err, tt.code, tt.want)
		}
		// The verbs put their own names before these.
		want := strings.TrimPrefix(tt.want, "get features: ")
		if err := c.Reset(t.Context()); exit.Of(err) != tt.code || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("reset: code %d, %v, want %s", exit.Of(err), err, want)
		}
		if err := c.Rescan(t.Context()); exit.Of(err) != tt.code || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("rescan: code %d, %v, want %s", exit.Of(err), err, want)
		}
	}
}
