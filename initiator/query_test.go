package initiator

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// TestQuery asks for one of each kind.
func TestQuery(t *testing.T) {
	s := newLookSetup(t, nil)
	var cmd nvme.Command
	page := make([]byte, nvme.IdentifySize)
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	if _, err := s.sub.Query(t.Context(), &cmd, page); err != nil || nvme.IdentifyControllerAt(page).MN() != "fake" {
		t.Errorf("identify: %v", err)
	}
	cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 512, 0, true)
	if _, err := s.sub.Query(t.Context(), &cmd, page[:512]); err != nil || !bytes.Equal(page[:512], bytes.Repeat([]byte{nvme.LogSMART}, 512)) {
		t.Errorf("log page: %v, %x…", err, page[:8])
	}
	long := make([]byte, MaxQuery)
	cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, MaxQuery, 0, true)
	if _, err := s.sub.Query(t.Context(), &cmd, long); err != nil || !bytes.Equal(long, bytes.Repeat([]byte{nvme.LogSMART}, MaxQuery)) {
		t.Errorf("long log page: %v, %x…%x", err, long[:8], long[MaxQuery-8:])
	}
	cmd.SetGetFeatures(nvme.FeatureKeepAlive)
	if v, err := s.sub.Query(t.Context(), &cmd, nil); err != nil || v != nvme.FeatureKeepAlive<<8 {
		t.Errorf("feature: %#x, %v", v, err)
	}
	cmd.SetPropertyGet(nvme.PropCAP, true)
	if v, err := s.sub.Query(t.Context(), &cmd, nil); err != nil || v != uint64(nvme.NewCap(127, 15, 1)) {
		t.Errorf("property: %#x, %v", v, err)
	}
	cmd.SetIdentify(0xC0, 0, 0)
	var status nvme.Status
	if _, err := s.sub.Query(t.Context(), &cmd, page); !errors.As(err, &status) || status.Code() != nvme.StatusInvalidField {
		t.Errorf("a command that the target refuses: %v", err)
	}
	if n := s.sub.Info().Paths[0].Losses; n != 0 {
		t.Errorf("the association was lost %d times", n)
	}
}

// TestQueryThatIsNone is what must not be sent.
func TestQueryThatIsNone(t *testing.T) {
	var sent atomic.Int32
	var watched atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if op := cmd.Opcode(); watched.Load() && op != nvme.AdminKeepAlive {
				sent.Add(1)
			}
			return 0, false
		}
	})
	watched.Store(true)
	for name, tt := range map[string]struct {
		set func(*nvme.Command)
		n   int
	}{
		"set features":        {func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureKeepAlive, 1) }, 0},
		"format":              {func(c *nvme.Command) { c.SetOpcode(nvme.AdminFormatNVM) }, 0},
		"event request":       {func(c *nvme.Command) { c.SetAsyncEvent() }, 0},
		"vendor command":      {func(c *nvme.Command) { c.SetOpcode(0xC2) }, 0},
		"property set":        {func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 0, false) }, 0},
		"connect":             {func(c *nvme.Command) { c.SetConnect(1, 31, 0, false) }, nvme.ConnectDataSize},
		"short identify":      {func(c *nvme.Command) { c.SetIdentify(nvme.CNSController, 0, 0) }, 512},
		"identify, no data":   {func(c *nvme.Command) { c.SetIdentify(nvme.CNSController, 0, 0) }, 0},
		"log of other length": {func(c *nvme.Command) { c.SetGetLogPage(nvme.LogSMART, 0, 512, 0, false) }, 508},
		"long log":            {func(c *nvme.Command) { c.SetGetLogPage(nvme.LogSMART, 0, MaxQuery+4, 0, false) }, MaxQuery + 4},
		"property with data":  {func(c *nvme.Command) { c.SetPropertyGet(nvme.PropCAP, true) }, 8},
	} {
		var cmd nvme.Command
		tt.set(&cmd)
		var bad *QueryError
		if _, err := s.sub.Query(t.Context(), &cmd, make([]byte, tt.n)); !errors.As(err, &bad) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := sent.Load(); n > 0 {
		t.Errorf("%d commands were sent", n)
	}
}

// TestQueryAbandoned: a caller that gives up does not end the association and leaves no
// buffer behind, and the answer that comes later is nobody's.
func TestQueryAbandoned(t *testing.T) {
	var silent atomic.Bool
	arrived := make(chan struct{}, 1)
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		cfg.AdminTimeout = 500 * time.Millisecond
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if cmd.Opcode() == nvme.AdminGetFeatures && silent.Load() {
				arrived <- struct{}{}
				return noAnswer, true
			}
			return 0, false
		}
	})
	silent.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-arrived
		cancel()
	}()
	var cmd nvme.Command
	cmd.SetGetFeatures(nvme.FeatureKeepAlive)
	if _, err := s.sub.Query(ctx, &cmd, make([]byte, 8)); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if n := s.sub.Info().Paths[0].Losses; n != 0 {
		t.Errorf("the association was lost with its caller")
	}
	// The controller has the time that any admin command has.
	waitFor(t, "the loss of the association", func() bool { return s.sub.Info().Paths[0].Losses == 1 })
	silent.Store(false)
	waitFor(t, "the next association", func() bool { return s.sub.Info().State == StateLive })
	if v, err := s.sub.Query(t.Context(), &cmd, nil); err != nil || v != nvme.FeatureKeepAlive<<8 {
		t.Errorf("after it: %#x, %v", v, err)
	}
}

// TestQueriesWhileAssociationsEnd has many callers while the connection is cut again and
// again: each gets its own answer or an error, and the buffers stay registered as long as
// one of them uses them.
func TestQueriesWhileAssociationsEnd(t *testing.T) {
	s := newLookSetup(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	var answered atomic.Int32
	for i := range 2 * maxQueries {
		callers.Go(func() {
			lid := uint8(i + 0x10)
			for ctx.Err() == nil {
				var cmd nvme.Command
				out := make([]byte, 512)
				cmd.SetGetLogPage(lid, 0, 512, 0, true)
				if _, err := s.sub.Query(ctx, &cmd, out); err != nil {
					continue
				}
				answered.Add(1)
				if !bytes.Equal(out, bytes.Repeat([]byte{lid}, 512)) {
					t.Errorf("log page %#x has %x…", lid, out[:8])
				}
			}
		})
	}
	for range 20 {
		losses := s.sub.Info().Paths[0].Losses
		s.fabric.KillAll(hostAddr)
		waitFor(t, "the next association", func() bool { i := s.sub.Info().Paths[0]; return i.Losses > losses && i.State == StateLive })
		want := answered.Load() + maxQueries
		waitFor(t, "answers after the cut", func() bool { return answered.Load() > want })
	}
	cancel()
	callers.Wait()
}

// TestReset: the next association is in use when Reset returns, requests wait for it, and
// no number of resets makes the controller give up.
func TestReset(t *testing.T) {
	const loss = 2 * time.Second // longer than a reconnect takes on a busy machine
	s := newLookSetup(t, func(_ *fakeTarget, cfg *Config) { cfg.CtrlLoss = loss })
	began := time.Now()
	resets := 0
	for ; time.Since(began) < 2*loss; resets++ {
		if err := s.sub.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		if i := s.sub.Info().Paths[0]; i.State != StateLive || i.Losses != resets+1 || !errors.Is(i.Reason, errReset) || i.Outages.Losses[LossReset] != resets+1 {
			t.Fatalf("after %d: %v, lost %d times, as %v: %v", resets+1, i.State, i.Losses, i.Outages.Losses, i.Reason)
		}
	}
	if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
		t.Errorf("write: %v", e)
	}
}

// TestResetOfNothing: without an association there is nothing to reset, to ask, or to
// look at. A caller that gives up gets its own error.
func TestResetOfNothing(t *testing.T) {
	var refuse atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
		f.connect = func(nvme.ConnectParams, *nvme.ConnectData) nvme.Status {
			if refuse.Load() {
				return nvme.StatusConnectControllerBusy
			}
			return nvme.StatusSuccess
		}
	})
	refuse.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.sub.Reset(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a target that refuses: %v", err)
	}
	if err := s.sub.Reset(t.Context()); !errors.Is(err, ErrNotConnected) {
		t.Errorf("reset: %v", err)
	}
	if err := s.sub.Rescan(); !errors.Is(err, ErrNotConnected) {
		t.Errorf("rescan: %v", err)
	}
	var cmd nvme.Command
	cmd.SetGetFeatures(nvme.FeatureKeepAlive)
	if _, err := s.sub.Query(t.Context(), &cmd, nil); !errors.Is(err, ErrNotConnected) {
		t.Errorf("query: %v", err)
	}
	refuse.Store(false)
	waitFor(t, "the next association", func() bool { return s.sub.Info().State == StateLive })
}

// TestRescan finds what no event told of.
func TestRescan(t *testing.T) {
	s := newLookSetup(t, nil)
	s.target.mu.Lock()
	s.target.namespaces = []uint32{1, 5}
	s.target.mu.Unlock()
	if err := s.sub.Rescan(); err != nil {
		t.Fatal(err)
	}
	s.expect(t, "5 added")
}
