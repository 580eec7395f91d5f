package uring

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
)

// newRing makes a ring on the test's own thread. It is closed at the end of the test.
func newRing(t testing.TB, cfg Config) *Ring {
	t.Helper()
	runtime.LockOSThread()
	r, err := New(cfg)
	if err != nil {
		runtime.UnlockOSThread()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
	return r
}

// kinds holds the configurations in use: that of a loop and that of a control ring.
var kinds = []struct {
	name string
	cfg  Config
}{
	{"loop", Config{Entries: 8, Loop: true}},
	{"control", Config{Entries: 8, SQE128: true}},
	{"plain", Config{Entries: 8}},
}

func nop(t testing.TB, r *Ring, data uint64) {
	t.Helper()
	s := r.SQE()
	if s == nil {
		t.Fatal("submission queue full")
	}
	s.Opcode, s.UserData = OpNop, data
}

func take(t testing.TB, r *Ring) CQE {
	t.Helper()
	for range 1000 {
		if c := r.Next(); c != nil {
			got := *c
			r.Seen()
			return got
		}
		if err := r.Wait(100 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("no completion")
	return CQE{}
}

func TestNops(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRing(t, k.cfg)
			if r.Next() != nil || r.CQReady() || r.Pending() != 0 {
				t.Fatal("fresh ring is not empty")
			}
			sent, got := uint64(0), uint64(0)
			for round := range 50 { // several times round both queues
				n := round%r.Entries() + 1
				for range n {
					nop(t, r, sent)
					sent++
				}
				if r.Pending() != n {
					t.Fatalf("%d pending, want %d", r.Pending(), n)
				}
				if err := r.Submit(); err != nil {
					t.Fatal(err)
				}
				if r.Pending() != 0 {
					t.Fatalf("%d pending after submit", r.Pending())
				}
				for ; got < sent; got++ {
					if c := take(t, r); c.UserData != got || c.Res != 0 {
						t.Fatalf("completion %+v, want user data %d", c, got)
					}
				}
				if r.CQReady() {
					t.Fatal("more completions than commands")
				}
			}
		})
	}
}

func TestFullQueues(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRing(t, k.cfg)
			const total = 100 // beyond the completion queue of 16
			for sent := range uint64(total) {
				s := r.SQE()
				if s == nil {
					if r.Pending() != r.Entries() {
						t.Fatalf("full with %d of %d pending", r.Pending(), r.Entries())
					}
					if err := r.Submit(); err != nil {
						t.Fatal(err)
					}
					s = r.SQE()
				}
				s.UserData = sent
			}
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			for want := range uint64(total) {
				if c := take(t, r); c.UserData != want {
					t.Fatalf("completion %+v, want user data %d", c, want)
				}
			}
		})
	}
}

// TestConsumedBeforeWait checks that an enter publishes the consumed completions to the
// kernel. Otherwise the kernel would not wait.
func TestConsumedBeforeWait(t *testing.T) {
	r := newRing(t, Config{Loop: true})
	nop(t, r, 1)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if r.Next() == nil {
		t.Fatal("no completion")
	}
	r.Seen()
	if err := r.Wait(0); err != nil {
		t.Fatal(err)
	}
	if head := r.cq.khead.Load(); head != 1 {
		t.Fatalf("the kernel's head is %d", head)
	}
}

func TestWaitBound(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRing(t, k.cfg)
			for range 3 {
				if err := r.Wait(time.Microsecond); err != nil {
					t.Fatal(err)
				}
				if r.Next() != nil {
					t.Fatal("a completion of nothing")
				}
			}
		})
	}
}

func TestWaitBlocking(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRing(t, k.cfg)
			efd := eventfd(t)
			buf, err := unix.Mmap(-1, 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Munmap(buf) }()
			s := r.SQE()
			s.Opcode, s.FD, s.Off, s.UserData = OpRead, int32(efd), ^uint64(0), 7
			s.Addr, s.Len = addr(buf), 8
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			go signal(efd, 3)
			for !r.CQReady() {
				if err := r.WaitBlocking(); err != nil {
					t.Fatal(err)
				}
			}
			if c := take(t, r); c.UserData != 7 || c.Res != 8 || binary.NativeEndian.Uint64(buf) != 3 {
				t.Fatalf("completion %+v, read %d", c, binary.NativeEndian.Uint64(buf))
			}
		})
	}
}

// TestTaskRun checks that TaskRun reports a completion of a loop ring, and that the next
// Submit makes it, not earlier.
func TestTaskRun(t *testing.T) {
	r := newRing(t, Config{Loop: true})
	efd := eventfd(t)
	s := r.SQE()
	s.Opcode, s.FD, s.OpFlags = OpPollAdd, int32(efd), unix.POLLIN
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if r.TaskRun() || r.CQReady() {
		t.Fatal("completion without an event")
	}
	signal(efd, 1)
	if !r.TaskRun() || r.CQReady() {
		t.Fatalf("after the event: task run %v, ready %v", r.TaskRun(), r.CQReady())
	}
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if r.TaskRun() || !r.CQReady() {
		t.Fatalf("after submit: task run %v, ready %v", r.TaskRun(), r.CQReady())
	}
	take(t, r)
}

// TestOtherThread checks that a loop ring refuses all threads except its own.
func TestOtherThread(t *testing.T) {
	r := newRing(t, Config{Loop: true})
	errs := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		errs <- r.Submit()
	}()
	if err := <-errs; err == nil {
		t.Fatal("another thread may submit")
	}
}

func TestReadMultishot(t *testing.T) {
	r := newRing(t, Config{Loop: true})
	if !r.Supports(OpReadMultishot) {
		testenv.Need(t, "read-multishot", errors.New("the kernel has no READ_MULTISHOT (Linux 6.7)"))
	}
	b, err := r.RegisterBufRing(1, 4, 8)
	if err != nil {
		t.Fatal(err)
	}
	efd := eventfd(t)
	arm := func() {
		s := r.SQE()
		s.Opcode, s.Flags, s.FD, s.BufIndex = OpReadMultishot, BufferSelect, int32(efd), 1
		if err := r.Submit(); err != nil {
			t.Fatal(err)
		}
	}
	arm()
	var held []uint16
	for n := range uint64(40) {
		signal(efd, n+1)
		c := take(t, r)
		if len(held) == 4 { // all buffers are ours: the command ends
			if c.Res != -int32(unix.ENOBUFS) || c.Flags&CQEMore != 0 {
				t.Fatalf("without buffers: %+v", c)
			}
			for _, id := range held {
				b.Recycle(id)
			}
			held = held[:0]
			arm()
			c = take(t, r)
		}
		if c.Res != 8 || c.Flags&CQEMore == 0 || c.Flags&CQEBuffer == 0 {
			t.Fatalf("event %d: %+v", n, c)
		}
		if v := binary.NativeEndian.Uint64(b.Bytes(BufID(c.Flags))); v != n+1 {
			t.Fatalf("event %d: read %d", n, v)
		}
		held = append(held, BufID(c.Flags))
	}
}

func TestFixedFiles(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRing(t, k.cfg)
			var fds [2]int
			if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(fds[0]) }()
			i, err := r.FixFile(fds[1])
			if err != nil {
				t.Fatal(err)
			}
			j, err := r.FixFile(fds[0])
			if err != nil || j == i {
				t.Fatalf("second index %d after %d: %v", j, i, err)
			}
			_ = unix.Close(fds[1])
			s := r.SQE()
			s.Opcode, s.Flags, s.FD, s.OpFlags = OpPollAdd, FixedFile, int32(i), unix.POLLOUT
			if c := take(t, r); c.Res < 0 {
				t.Fatalf("poll of a fixed file: %+v", c)
			}
			if _, err := unix.Read(fds[0], make([]byte, 1)); err != unix.EAGAIN {
				t.Fatalf("read while the ring holds the other end: %v", err)
			}
			if err := r.UnfixFile(i); err != nil {
				t.Fatal(err)
			}
			pfd := []unix.PollFd{{Fd: int32(fds[0])}}
			if n, err := unix.Poll(pfd, 5000); n != 1 || err != nil {
				t.Fatalf("the ring still holds the file: %d, %v", n, err)
			}
			for n := 1; ; n++ {
				if _, err := r.FixFile(fds[0]); err != nil {
					if n != maxFixedFiles || !errors.Is(err, ErrNoFixedFile) {
						t.Fatalf("file %d: %v", n, err)
					}
					break
				}
			}
		})
	}
}

// TestCloseFreesFiles checks that nothing keeps a file of a pending command open after
// Close.
func TestCloseFreesFiles(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			before := mappings(t)
			r, err := New(k.cfg)
			if err != nil {
				t.Fatal(err)
			}
			var fds [2]int
			if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(fds[0]) }()
			if _, err := r.FixFile(fds[1]); err != nil {
				t.Fatal(err)
			}
			s := r.SQE()
			s.Opcode, s.FD, s.OpFlags = OpPollAdd, int32(fds[1]), unix.POLLPRI // never
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(fds[1])
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			// The reader gets a hang-up when the writer's end is closed.
			pfd := []unix.PollFd{{Fd: int32(fds[0])}}
			if n, err := unix.Poll(pfd, 5000); n != 1 || err != nil {
				t.Fatalf("the file of a pending command is still open: %d, %v", n, err)
			}
			if after := mappings(t); after != before {
				t.Fatalf("%d mappings of rings, before %d", after, before)
			}
		})
	}
}

func TestAllocs(t *testing.T) {
	r := newRing(t, Config{Loop: true})
	if n := testing.AllocsPerRun(1000, func() {
		nop(t, r, 1)
		if err := r.Submit(); err != nil {
			t.Fatal(err)
		}
		nop(t, r, 2)
		if err := r.Wait(time.Millisecond); err != nil {
			t.Fatal(err)
		}
		nop(t, r, 3)
		if err := r.WaitBlocking(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if r.Next() == nil {
				t.Fatal("no completion")
			}
			r.Seen()
		}
	}); n != 0 {
		t.Fatalf("%v allocations in a round", n)
	}
}

func TestTooOld(t *testing.T) {
	_, err := setup(8, &params{flags: 1 << 31})
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("unknown flag: %v", err)
	}
}

func BenchmarkNop(b *testing.B) {
	for _, k := range kinds[:2] {
		b.Run(k.name, func(b *testing.B) {
			r := newRing(b, k.cfg)
			for b.Loop() {
				r.SQE()
				if err := r.Submit(); err != nil {
					b.Fatal(err)
				}
				if r.Next() == nil {
					b.Fatal("no completion")
				}
				r.Seen()
			}
		})
	}
}

func BenchmarkNop32(b *testing.B) {
	r := newRing(b, Config{Entries: 32, Loop: true})
	for b.Loop() {
		for range 32 {
			r.SQE()
		}
		if err := r.Submit(); err != nil {
			b.Fatal(err)
		}
		for r.Next() != nil {
			r.Seen()
		}
	}
}

func eventfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func signal(efd int, n uint64) {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], n)
	if _, err := unix.Write(efd, b[:]); err != nil {
		panic(err)
	}
}

// mappings returns the number of rings that are mapped.
func mappings(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(maps), "io_uring")
}

func addr(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }
