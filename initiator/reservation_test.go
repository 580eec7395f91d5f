package initiator

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// reserved is how many commands of an opcode arrived.
func (f *fakeTarget) reserved(op nvme.Opcode) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.commands[op]
}

// TestReserve sends each reservation command, with its keys in the capsule and by key.
func TestReserve(t *testing.T) {
	for _, inCapsule := range []int{0, 4096} {
		s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.inCapsule = inCapsule })
		ns := s.sub.Namespaces()[0]
		keys := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7, 8}, 2)
		for op, set := range map[nvme.Opcode]func(*nvme.Command){
			nvme.OpReservationRegister: func(c *nvme.Command) { c.SetReservationRegister(99, 0, false, 0) },
			nvme.OpReservationAcquire:  func(c *nvme.Command) { c.SetReservationAcquire(99, 0, false, 1) },
			nvme.OpReservationRelease:  func(c *nvme.Command) { c.SetReservationRelease(99, 0, false, 1) },
		} {
			var cmd nvme.Command
			set(&cmd)
			data := bytes.Clone(keys)
			if op == nvme.OpReservationRelease {
				data = data[:8]
			}
			if err := ns.Reserve(t.Context(), &cmd, data); err != nil {
				t.Errorf("%s: %v", op.IOString(), err)
			}
			s.target.mu.Lock()
			if !bytes.Equal(s.target.keys, data) {
				t.Errorf("%s: keys %x, want %x", op.IOString(), s.target.keys, data)
			}
			s.target.mu.Unlock()
		}
		var cmd nvme.Command
		cmd.SetReservationReport(99, 4096, true)
		report := make([]byte, 4096)
		if err := ns.Reserve(t.Context(), &cmd, report); err != nil || !bytes.Equal(report, bytes.Repeat([]byte{1}, 4096)) {
			t.Errorf("report: %v, %x…", err, report[:8])
		}
		if used := s.sub.Info().Memory.Used; used != 0 {
			t.Errorf("%d bytes are still in use", used)
		}
	}
}

func TestReserveThatIsNone(t *testing.T) {
	s := newLookSetup(t, nil)
	ns := s.sub.Namespaces()[0]
	for name, tt := range map[string]struct {
		set func(*nvme.Command)
		n   int
	}{
		"write":        {func(c *nvme.Command) { c.SetWrite(1, 0, 1, false) }, 512},
		"short keys":   {func(c *nvme.Command) { c.SetReservationRegister(1, 0, false, 0) }, 8},
		"long keys":    {func(c *nvme.Command) { c.SetReservationRelease(1, 0, false, 1) }, 16},
		"long report":  {func(c *nvme.Command) { c.SetReservationReport(1, 8192, true) }, 8192},
		"short report": {func(c *nvme.Command) { c.SetReservationReport(1, 4096, true) }, 512},
	} {
		var cmd nvme.Command
		tt.set(&cmd)
		var bad *QueryError
		if err := ns.Reserve(t.Context(), &cmd, make([]byte, tt.n)); !errors.As(err, &bad) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReserveOnce: a reservation command is sent once, whatever the answer is, and the caller
// learns if it is not known whether the target carried it out.
func TestReserveOnce(t *testing.T) {
	var answer atomic.Uint32 // status of registers
	arrived := make(chan struct{}, 4)
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		cfg.IOTimeout = time.Minute // nobody waits for it
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if qid == 0 || cmd.Opcode() != nvme.OpReservationRegister || answer.Load() == 0 {
				return 0, false
			}
			arrived <- struct{}{}
			return nvme.Status(answer.Load()), true
		}
	})
	ns := s.sub.Namespaces()[0]
	register := func(ctx context.Context) error {
		var cmd nvme.Command
		cmd.SetReservationRegister(1, 0, false, 0)
		return ns.Reserve(ctx, &cmd, make([]byte, nvme.ReservationKeys))
	}
	for _, status := range []nvme.Status{nvme.StatusReservationConflict, nvme.StatusInternal, nvme.StatusANATransition} {
		before := s.target.reserved(nvme.OpReservationRegister)
		answer.Store(uint32(status))
		var got nvme.Status
		if err := register(t.Context()); !errors.As(err, &got) || got.Code() != status {
			t.Errorf("%v, want %v", err, status)
		}
		<-arrived
		if n := s.target.reserved(nvme.OpReservationRegister) - before; n != 1 {
			t.Errorf("after %v the command was sent %d times", status, n)
		}
	}
	answer.Store(uint32(noAnswer))
	before := s.target.reserved(nvme.OpReservationRegister)
	ended := make(chan error, 1)
	go func() { ended <- register(t.Context()) }()
	<-arrived
	s.fabric.KillAll(hostAddr)
	if err := <-ended; !errors.Is(err, ErrUncertain) {
		t.Errorf("association lost: %v", err)
	}
	waitFor(t, "the next association", func() bool { return s.sub.Info().State == StateLive })
	answer.Store(0)
	waitFor(t, "an answer", func() bool { return register(t.Context()) == nil }) // the namespace may be held for a moment
	if n := s.target.reserved(nvme.OpReservationRegister) - before; n != 2 {
		t.Errorf("the command was sent %d times, want once before and once after", n)
	}
	// A caller that gives up, and then a controller that closes.
	answer.Store(uint32(noAnswer))
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- register(ctx) }()
	<-arrived
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// TestReserveNowhere: without an association, or without the namespace, nothing is sent and
// nobody waits.
func TestReserveNowhere(t *testing.T) {
	var refuse atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
		f.namespaces = []uint32{1, 5}
		f.connect = func(nvme.ConnectParams, *nvme.ConnectData) nvme.Status {
			if refuse.Load() {
				return nvme.StatusConnectControllerBusy
			}
			return nvme.StatusSuccess
		}
	})
	ns := s.sub.Namespaces()[1]
	report := func() error {
		var cmd nvme.Command
		cmd.SetReservationReport(5, 64, true)
		return ns.Reserve(t.Context(), &cmd, make([]byte, 64))
	}
	refuse.Store(true)
	s.fabric.KillAll(hostAddr)
	waitFor(t, "the loss", func() bool { return s.sub.Info().State == StateConnecting })
	waitFor(t, "an error", func() bool { return errors.Is(report(), ErrNotConnected) }) // a report that the loss overtakes is uncertain
	refuse.Store(false)
	waitFor(t, "the next association", func() bool { return report() == nil })
	s.target.change(func() { s.target.namespaces = []uint32{1} })
	s.expect(t, "5 removed")
	if err := report(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a namespace that is gone: %v", err)
	}
}
