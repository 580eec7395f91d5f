package poller

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/internal/uring"
)

// canaries are descriptors with the numbers of descriptors that were closed.
func canaries(t *testing.T) (check func()) {
	t.Helper()
	var fds []int
	for range 16 {
		fds = append(fds, eventfd(t))
	}
	return func() {
		t.Helper()
		var b [8]byte
		for _, fd := range fds {
			if n, err := unix.Read(fd, b[:]); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("descriptor %d was somebody else's: read %d bytes % x, error %v", fd, n, b[:n], err)
			}
		}
	}
}

// TestStopAttached checks that a loop ends with sources, watches and pending commands in
// any state, and calls none of them any more.
func TestStopAttached(t *testing.T) {
	for _, cfg := range []Config{{}, {pollAdd: true}} {
		l, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		polls := 0
		s := &source{poll: func() int { polls++; return 0 }, arm: func() Readiness { return Spin }}
		var fds [3]int
		for i := range fds {
			if fds[i], err = newEventfd(); err != nil {
				t.Fatal(err)
			}
		}
		on(t, l, func() {
			l.Attach(s)
			for _, fd := range fds {
				if err := l.Watch(fd, counter(func(int) {})); err != nil {
					t.Error(err)
				}
			}
		})
		_ = unix.Close(fds[0])
		if err := l.Stop(); err != nil {
			t.Fatal(err)
		}
		_, _ = unix.Close(fds[1]), unix.Close(fds[2])
		check := canaries(t)
		before := polls
		afterStop(t, l, s, fds[:])
		if polls != before {
			t.Errorf("polled %d times after the end", polls-before)
		}
		check()
	}
}

// afterStop calls all methods of a loop that has ended.
func afterStop(t *testing.T, l *Loop, s Source, fds []int) {
	t.Helper()
	for range 3 {
		l.Wake()
	}
	if err := l.Call(func() { t.Error("called") }); !errors.Is(err, ErrStopped) {
		t.Errorf("call: %v", err)
	}
	for _, fd := range fds {
		if err := l.Unwatch(fd); err != nil {
			t.Errorf("unwatch: %v", err)
		}
	}
	fd := eventfd(t)
	for _, watch := range []func(int, Watcher) error{l.Watch, l.WatchReadable} {
		if err := watch(fd, counter(func(int) { t.Error("event") })); !errors.Is(err, ErrStopped) {
			t.Errorf("watch: %v", err)
		}
	}
	l.Attach(s)
	l.Detach(s)
	base := l.Handle(handler(func(uint64, int32, uint32) { t.Error("completion") }))
	for range 2000 { // more than there are entries
		e := l.sqe()
		e.Opcode, e.UserData = uring.OpNop, base
	}
	l.Unhandle(base)
	l.Unhandle(base)
	l.Step()
	if r := l.ring; r.SQE() != nil || r.Next() != nil || r.CQReady() || r.TaskRun() || r.Pending() != 0 ||
		r.Submit() == nil || r.Wait(time.Second) == nil || r.WaitBlocking() == nil || r.Close() != nil {
		t.Error("the ring is in use")
	}
	if err := l.SetAffinity([]int{0}); !errors.Is(err, ErrStopped) {
		t.Errorf("set affinity: %v", err) // the thread's number may be another one's
	}
	_ = l.Snapshot()
	if err := l.Stop(); !errors.Is(err, l.Err()) {
		t.Errorf("second stop: %v", err)
	}
}

// TestFailedStop is TestStopAttached for a loop whose ring fails.
func TestFailedStop(t *testing.T) {
	l, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	fd := eventfd(t)
	on(t, l, func() {
		if err := l.Watch(fd, counter(func(int) {})); err != nil {
			t.Error(err)
		}
	})
	files := len(testenv.OpenFiles(t))
	on(t, l, func() { l.failure = unix.EIO })
	if err := l.Stop(); !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	check := canaries(t)
	afterStop(t, l, &source{}, []int{fd})
	check()
	if n := len(testenv.OpenFiles(t)) - 16 - 1; n > files-3 { // the ring, the loop's eventfd and the watch are gone; the canaries and one more came
		t.Errorf("%d files are open, were %d", n, files)
	}
}

// TestWatchClosed checks that a file that is closed before it is unwatched does not
// affect the next owner of its number.
func TestWatchClosed(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		old, err := newEventfd()
		if err != nil {
			t.Fatal(err)
		}
		events := make(chan int, 16)
		watchOn(t, l, old, counter(func(n int) { events <- n }))
		writer, err := unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(old)
		stranger, err := newEventfd()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(stranger) })
		if stranger != old {
			t.Fatalf("descriptor %d, want %d", stranger, old)
		}
		signalEventfd(stranger)
		signalEventfd(writer)
		_ = unix.Close(writer)
		if n := <-events; n != 1 {
			t.Errorf("%d events", n)
		}
		if err := l.Unwatch(old); err != nil {
			t.Error(err)
		}
		var b [8]byte
		if n, err := unix.Read(stranger, b[:]); n != 8 {
			t.Errorf("the stranger's event is gone: %v", err)
		}
	})
}
