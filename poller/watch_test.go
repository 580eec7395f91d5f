package poller

import (
	"errors"
	"io"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/internal/uring"
)

// counter is a Watcher made of a function.
type counter func(n int)

func (c counter) Event(n int) { c(n) }

// failing is a Failer that sends its errors to a channel.
type failing struct {
	events chan int
	failed chan error
}

func (f *failing) Event(n int)      { f.events <- n }
func (f *failing) Failed(err error) { f.failed <- err }

// eachWatch runs a test with READ_MULTISHOT and with POLL_ADD.
func eachWatch(t *testing.T, test func(t *testing.T, l *Loop)) {
	for _, kind := range []struct {
		name string
		cfg  Config
	}{{"read", Config{}}, {"poll", Config{pollAdd: true}}} {
		t.Run(kind.name, func(t *testing.T) {
			l := newLoop(t, kind.cfg)
			if !kind.cfg.pollAdd {
				requireReadMultishot(t, l)
			}
			test(t, l)
		})
	}
}

// requireReadMultishot skips the test on a kernel without READ_MULTISHOT (before Linux
// 6.7), unless UN_REQUIRE lists it.
func requireReadMultishot(t *testing.T, l *Loop) {
	t.Helper()
	has := false
	on(t, l, func() { has = l.bufs != nil })
	if !has {
		testenv.Need(t, "read-multishot", errors.New("the kernel has no READ_MULTISHOT"))
	}
}

func eventfd(t testing.TB) int {
	t.Helper()
	fd, err := newEventfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// pipe makes a pipe that keeps the boundaries of writes, as an RDMA completion channel
// keeps those of events. The test closes w.
func pipe(t testing.TB) (r, w int) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_DIRECT); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fds[0]) })
	return fds[0], fds[1]
}

func write(t testing.TB, fd, events int) {
	t.Helper()
	n, err := unix.Write(fd, make([]byte, events*eventSize))
	if err != nil || n != events*eventSize {
		t.Fatalf("wrote %d: %v", n, err)
	}
}

func watchOn(t testing.TB, l *Loop, fd int, w Watcher) {
	t.Helper()
	on(t, l, func() {
		if err := l.Watch(fd, w); err != nil {
			t.Error(err)
		}
	})
}

func TestWatchEventfd(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		efd := eventfd(t)
		signalEventfd(efd) // there before the watch
		events := make(chan int, 1)
		watchOn(t, l, efd, counter(func(n int) { events <- n }))
		for range 200 {
			if n := <-events; n != 1 {
				t.Fatalf("%d events of one count", n)
			}
			signalEventfd(efd)
		}
		<-events
		if err := l.Unwatch(efd); err != nil {
			t.Fatal(err)
		}
		signalEventfd(efd)
		on(t, l, func() {})
		if len(events) != 0 {
			t.Fatal("an event after Unwatch")
		}
		if err := l.Unwatch(efd); !errors.Is(err, unix.ENOENT) {
			t.Fatalf("second Unwatch: %v", err)
		}
	})
}

// TestWatchMany checks more simultaneous events than there are buffers (ENOBUFS).
func TestWatchMany(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		r, w := pipe(t)
		defer func() { _ = unix.Close(w) }()
		got := 0
		watchOn(t, l, r, counter(func(n int) { got += n }))
		sent := 0
		for range 20 {
			// A call holds the loop, so that all events are there at once. A
			// pipe has at least 15 packets.
			on(t, l, func() {
				for i := range 15 {
					write(t, w, i%8+1)
					sent += i%8 + 1
				}
			})
		}
		if err := l.Unwatch(r); err != nil {
			t.Fatal(err)
		}
		if got != sent {
			t.Fatalf("%d events of %d", got, sent)
		}
	})
}

// TestWatchNoBuffers checks that the read ends when no buffer is left, and continues.
func TestWatchNoBuffers(t *testing.T) {
	l := newLoop(t, Config{})
	requireReadMultishot(t, l)
	// A socket holds more packets than there are buffers.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = unix.Close(fds[0]), unix.Close(fds[1]) }()
	sent, got := 0, 0
	for ; ; sent++ {
		if _, err := unix.Write(fds[1], make([]byte, eventSize)); err != nil {
			break
		}
	}
	if sent <= watchBuffers {
		t.Fatalf("a socket takes %d packets only", sent)
	}
	done := make(chan struct{})
	watchOn(t, l, fds[0], counter(func(n int) {
		if got += n; got == sent {
			close(done)
		}
	}))
	<-done
	if err := l.Unwatch(fds[0]); err != nil {
		t.Fatal(err)
	}
	if f := l.Snapshot().WatchFailures; f != 0 {
		t.Fatalf("%d failures", f)
	}
}

// TestUnwatchLast checks that data written before Unwatch is delivered, and that the file
// is then free: the writer notices that its only reader has closed.
func TestUnwatchLast(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		for i := range 300 {
			var fds [2]int
			if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_DIRECT); err != nil {
				t.Fatal(err)
			}
			got := 0
			watchOn(t, l, fds[0], counter(func(n int) { got += n }))
			for range i % 4 {
				write(t, fds[1], 1)
			}
			if err := l.Unwatch(fds[0]); err != nil {
				t.Fatal(err)
			}
			if got != i%4 {
				t.Fatalf("round %d: %d events of %d", i, got, i%4)
			}
			_ = unix.Close(fds[0])
			if _, err := unix.Write(fds[1], one); err != unix.EPIPE {
				t.Fatalf("round %d: something holds the file: %v", i, err)
			}
			_ = unix.Close(fds[1])
		}
		on(t, l, func() {
			if len(l.watches) != 1 { // the loop's own
				t.Errorf("%d watches left", len(l.watches))
			}
		})
	})
}

// TestUnwatchPending checks that an event that arrives together with the cancellation is
// delivered. The kernel executes the cancellation first.
func TestUnwatchPending(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		for range 20 {
			r, w := pipe(t)
			got := 0
			watchOn(t, l, r, counter(func(n int) { got += n }))
			settle(t, l)
			var a *watch
			on(t, l, func() {
				write(t, w, 1)
				write(t, w, 2)
				a = l.watched(r)
				l.cancel(a)
			})
			<-a.gone
			if got != 3 {
				t.Fatalf("%d events of 3", got)
			}
			_ = unix.Close(w)
		}
	})
}

// TestUnwatchRace checks writers and Unwatch at the same time: no event is delivered
// twice or without a cause.
func TestUnwatchRace(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		for range 100 {
			r, w := pipe(t)
			got, sent := 0, 0
			watchOn(t, l, r, counter(func(n int) { got += n }))
			wrote := make(chan struct{})
			go func() {
				defer close(wrote)
				for range 10 {
					if _, err := unix.Write(w, one); err == nil {
						sent++
					}
					runtime.Gosched()
				}
			}()
			if err := l.Unwatch(r); err != nil {
				t.Fatal(err)
			}
			<-wrote
			rest := 0
			for buf := make([]byte, 64); ; rest++ {
				if n, err := unix.Read(r, buf); n <= 0 || err != nil {
					break
				}
			}
			if got+rest != sent {
				t.Fatalf("%d events delivered and %d left of %d", got, rest, sent)
			}
			_ = unix.Close(w)
		}
	})
}

func TestWatchErrors(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		efd := eventfd(t)
		watchOn(t, l, efd, counter(func(int) {}))
		blocking, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(blocking) }()
		on(t, l, func() {
			for _, c := range []struct {
				fd   int
				want error
			}{{-1, unix.EBADF}, {1 << 20, unix.EBADF}, {efd, unix.EEXIST}, {blocking, unix.EINVAL}} {
				if err := l.Watch(c.fd, awake{}); !errors.Is(err, c.want) {
					t.Errorf("watch file %d: %v, want %v", c.fd, err, c.want)
				}
			}
		})
	})
}

// TestWatchEnd checks that a watch stays until it is unwatched if the other end of its
// pipe is closed.
func TestWatchEnd(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		r, w := pipe(t)
		f := &failing{events: make(chan int, 3), failed: make(chan error, 1)}
		write(t, w, 1)
		watchOn(t, l, r, f)
		<-f.events
		_ = unix.Close(w)
		if err := <-f.failed; !errors.Is(err, io.EOF) {
			t.Fatalf("failed: %v", err)
		}
		if n := settle(t, l).WatchFailures; n != 1 {
			t.Errorf("%d failures", n)
		}
		if err := l.Unwatch(r); err != nil {
			t.Fatal(err)
		}
		if len(f.events) != 0 || len(f.failed) != 0 {
			t.Error("heard more after the end")
		}
	})
}

// TestWatchUnreadable checks that a file that cannot be read fails at the first event.
func TestWatchUnreadable(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		nothing, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(nothing) }()
		f := &failing{events: make(chan int, 3), failed: make(chan error, 1)}
		watchOn(t, l, nothing, f)
		if err := <-f.failed; !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EBADFD) {
			t.Fatalf("failed: %v", err)
		}
		if err := l.Unwatch(nothing); err != nil {
			t.Fatal(err)
		}
	})
}

// TestWatchCancelled checks that the watch continues if all commands of the ring are
// canceled.
func TestWatchCancelled(t *testing.T) {
	eachWatch(t, func(t *testing.T, l *Loop) {
		efd := eventfd(t)
		events := make(chan int, 1)
		watchOn(t, l, efd, counter(func(n int) { events <- n }))
		for range 20 {
			cancelled := make(chan int32, 1)
			on(t, l, func() {
				var base uint64
				base = l.Handle(handler(func(_ uint64, res int32, _ uint32) {
					l.Unhandle(base)
					cancelled <- res
				}))
				s := l.sqe()
				s.Opcode, s.OpFlags, s.UserData = uring.OpAsyncCancel, uring.CancelAny|uring.CancelAll, base
			})
			if n := <-cancelled; n < 1 {
				t.Fatalf("cancelled %d", n)
			}
			signalEventfd(efd)
			if n := <-events; n != 1 {
				t.Fatalf("%d events", n)
			}
		}
	})
}

// TestWatchReadable checks that a file is not read, and that every arrival after it was
// emptied is reported.
func TestWatchReadable(t *testing.T) {
	l := newLoop(t, Config{})
	r, w := pipe(t)
	defer unix.Close(w)
	told := make(chan int, 16)
	on(t, l, func() {
		if err := l.WatchReadable(r, counter(func(n int) { told <- n })); err != nil {
			t.Error(err)
		}
	})
	buf := make([]byte, eventSize)
	for range 3 {
		write(t, w, 1)
		if n := <-told; n != 1 {
			t.Errorf("told of %d", n)
		}
		if n, err := unix.Read(r, buf); n != eventSize || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
	}
	if err := l.Unwatch(r); err != nil {
		t.Error(err)
	}
	write(t, w, 1)
	if n, err := unix.Read(r, buf); n != eventSize || err != nil {
		t.Errorf("after the end of the watch: read %d, %v", n, err)
	}
}
