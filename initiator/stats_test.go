package initiator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// TestDurations: about one request in SampleInterval is timed, the stages of each add up to
// the whole, and the clock is read four times for it and never for the others.
func TestDurations(t *testing.T) {
	const batches, depth = 200, 32
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	ns := c.Namespaces()[0]
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: depth, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	reqs, results := make([]block.Request, depth), make([]block.Result, depth)
	for i := range reqs {
		reqs[i] = block.Request{Op: block.OpRead + block.Op(i%2), Tag: uint16(i), Sector: uint64(i) * 8, Sectors: 8}
	}
	l := c.lanes[0]
	seconds := uint64(0)
	err = loops[0].Call(func() {
		first := c.clock.Load()
		for range batches {
			q.Submit(reqs)
			for got := 0; got < len(reqs); {
				l.Poll()
				l.Flush()
				got += q.Reap(results)
			}
		}
		seconds = uint64(c.clock.Load() - first)
	})
	if err != nil {
		t.Fatal(err)
	}
	whole, info := ns.Durations(), c.Info()
	timed := uint64(0)
	for op := range whole {
		h := &whole[op]
		timed += h.Count()
		sum := time.Duration(0)
		for s := range info.Stages {
			part := &info.Stages[s][op]
			sum += part.Sum
			if part.Count() != h.Count() {
				t.Errorf("%v: %d requests were timed, stage %v has %d", block.Op(op), h.Count(), Stage(s), part.Count())
			}
		}
		if sum != h.Sum {
			t.Errorf("%v: the stages take %v, the whole %v", block.Op(op), sum, h.Sum)
		}
		if served := op == int(block.OpRead) || op == int(block.OpWrite); served != (h.Count() > 0) || served && (info.Stages[StageWire][op].Sum <= 0 || h.Sum > time.Minute) {
			t.Errorf("%v: %+v, on the wire %+v", block.Op(op), h, info.Stages[StageWire][op])
		}
	}
	if mean := uint64(batches * depth / SampleInterval); timed < mean*8/10 || timed > mean*12/10+seconds {
		t.Errorf("%d requests of %d were timed in %d s, want about %d", timed, batches*depth, seconds, mean)
	}
	if l.stamps != 4*timed {
		t.Errorf("the clock was read %d times for %d requests that were timed", l.stamps, timed)
	}
	q.Close()
	// What was counted stays when a queue is closed and another one is opened.
	if q, err = ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096}); err != nil {
		t.Fatal(err)
	}
	if again := ns.Durations(); again != whole {
		t.Error("the next queue began anew")
	}
	q.Close()
	closeSubsystem(t, c)
}

// TestFewRequestsAreTimed: where few requests come, one in each second of the controller's
// clock is timed.
func TestFewRequestsAreTimed(t *testing.T) {
	var s sampler
	timed := 0
	for second := range uint32(100) {
		if s.sample(second) {
			timed++
		}
	}
	if timed != 100 {
		t.Errorf("%d requests of 100 were timed, at one per second", timed)
	}
}

// TestSamplerSkipsNoPattern: each place in batches of 64 is sampled about as often as the
// others.
func TestSamplerSkipsNoPattern(t *testing.T) {
	const rounds = 64 * 1000
	var s sampler
	var at [64]int
	for range rounds {
		for i := range at {
			if s.sample(0) {
				at[i]++
			}
		}
	}
	for i, n := range at {
		if mean := rounds / SampleInterval; n < mean*8/10 || n > mean*12/10 {
			t.Errorf("request %d of a batch was timed %d times, want about %d", i, n, mean)
		}
	}
}

// TestHistogram: a duration is in the first bucket whose bound is not below it.
func TestHistogram(t *testing.T) {
	var h histogram
	bounds := DurationBounds()
	for _, b := range bounds {
		h.add(b)
		h.add(b + 1)
	}
	var got Histogram
	h.addTo(&got)
	for i, n := range got.Buckets {
		want := uint64(2)
		if i == 0 || i == len(bounds) {
			want = 1
		}
		if n != want {
			t.Errorf("bucket %d has %d durations, want %d", i, n, want)
		}
	}
	if got.Count() != uint64(2*len(bounds)) {
		t.Errorf("%d durations", got.Count())
	}
}

// TestTimedRequestsAllocateNothing: each run has several requests that are timed.
func TestTimedRequestsAllocateNothing(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	q, err := c.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 32, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	reqs, results := make([]block.Request, 32), make([]block.Result, 32)
	for i := range reqs {
		reqs[i] = block.Request{Op: block.OpRead, Tag: uint16(i), Sectors: 8}
	}
	submitAll := func(l *lane) {
		for range 20 {
			q.Submit(reqs)
			for got := 0; got < len(reqs); {
				if l.Poll()+l.Flush() == 0 {
					runtime.Gosched() // there is one processor meanwhile
				}
				got += q.Reap(results)
			}
		}
	}
	allocs := math.Inf(1)
	err = loops[0].Call(func() {
		l := c.lanes[0]
		before := l.stamps
		runs := uint64(0)
		for range 5 { // what else the process allocates counts, too
			allocs = min(allocs, testing.AllocsPerRun(20, func() { submitAll(l) }))
			if runs += 21; allocs == 0 {
				break
			}
		}
		if timed := (l.stamps - before) / 4 / runs; timed < 5 {
			t.Errorf("%d requests were timed in each run", timed)
		}
	})
	if err != nil || allocs != 0 {
		t.Errorf("%v allocations in 640 requests, %v", allocs, err)
	}
	q.Close()
	closeSubsystem(t, c)
}

// TestLossReasons: the loss of an association is counted under its reason.
func TestLossReasons(t *testing.T) {
	for name, c := range map[string]struct {
		fault target.Fault
		want  []LossReason // several, if they race
	}{
		"wrong command id": {target.Fault{Corrupt: target.CorruptID}, []LossReason{LossProtocol}},
		"wrong SQ head":    {target.Fault{Corrupt: target.CorruptSQHead}, []LossReason{LossProtocol}},
		"short":            {target.Fault{Corrupt: target.CorruptShort}, []LossReason{LossQueuePair}},
		"no answer":        {target.Fault{Drop: true}, []LossReason{LossCommandTimeout}},
		"disconnect":       {target.Fault{Disconnect: true}, []LossReason{LossDisconnected, LossQueuePair}},
		"keep alive": {target.Fault{Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminKeepAlive}}, Drop: true},
			[]LossReason{LossKeepAlive}},
		"keep alive refused": {target.Fault{Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminKeepAlive}}, Status: nvme.StatusInternal},
			[]LossReason{LossKeepAlive}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, target.Config{}, target.NamespaceConfig{})
			loops := newLoops(t, 1)
			cfg := w.config(loops, poller.Request{IO: 1})
			cfg.KeepAlive = time.Second
			ctl := connect(t, cfg)
			c.fault.Count = 1
			w.target.Faults().Add(c.fault)
			read := block.Request{Op: block.OpRead, Sectors: 8}
			if errno := single(t, loops[0], ctl.Namespaces()[0], read); errno != 0 {
				t.Errorf("errno %d", errno)
			}
			waitFor(t, "the next association", func() bool { i := ctl.Info().Paths[0]; return i.Losses == 1 && i.State == StateLive })
			i := ctl.Info().Paths[0]
			got := 0
			for _, r := range c.want {
				got += i.Outages.Losses[r]
			}
			if got != 1 || i.Outages.Made != 1 || i.Outages.Attempts < 1 || len(i.Outages.Losses) != int(nLossReasons) {
				t.Errorf("%+v, want one loss for %v (%v)", i.Outages, c.want, i.Reason)
			}
			closeSubsystem(t, ctl)
		})
	}
	if got := (&Controller{life: t.Context()}).reasonOf(because(LossQueuePair, fmt.Errorf("queue: %w", because(LossProtocol, errors.New("nonsense"))))); got != LossProtocol {
		t.Errorf("the reason of an error with two is %v, want that of its cause", got)
	}
}

// TestOutageTime: an outage counts while it lasts and stays counted afterwards, and the
// requests that wait are counted as held.
func TestOutageTime(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	c := connect(t, cfg)
	if o := c.Info().Outages; o.Time != 0 || o.Made != 0 || o.Attempts != 0 {
		t.Errorf("%+v before any outage", o)
	}
	q, err := c.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	began := time.Now()
	fabric.KillAll(hostAddr)
	waitFor(t, "an outage of 100 ms", func() bool { return c.Info().Outages.Time >= 100*time.Millisecond })
	if err := loops[0].Call(func() { q.Submit([]block.Request{{Op: block.OpRead, Sectors: 8}}) }); err != nil {
		t.Fatal(err)
	}
	if l := c.Info().Lanes[0]; l.Held != 1 || l.Submitted-l.Completed != 1 {
		t.Errorf("%+v with a request that waits", l)
	}
	fabric.SetRefuse(targetAddr, 0, nil)
	waitFor(t, "the next association", func() bool { return c.Info().State == StateLive })
	lasted := time.Since(began)
	o := c.Info().Outages
	if o.Time < 100*time.Millisecond || o.Time > lasted || o.Made != 1 || o.Attempts < 2 {
		t.Errorf("%+v after an outage of at most %v", o, lasted)
	}
	if again := c.Info().Outages; again.Time != o.Time {
		t.Errorf("the outage goes on: %v, then %v", o.Time, again.Time)
	}
	var done [1]block.Result
	waitFor(t, "the end of the request", func() bool {
		n := 0
		loops[0].Call(func() { n = q.Reap(done[:]) })
		return n == 1
	})
	if l := c.Info().Lanes[0]; l.Held != 0 || l.Submitted != l.Completed {
		t.Errorf("%+v without requests", l)
	}
	q.Close()

	// A controller that is given up is unavailable for good.
	c.Abort(errors.New("the test is over"))
	<-c.Done()
	first := c.Info().Outages
	waitFor(t, "more time", func() bool { return c.Info().Outages.Time > first.Time })
	if first.Losses[LossAborted] != 1 {
		t.Errorf("%+v after Abort", first)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := c.Close(ctx); err != nil {
		t.Error(err)
	}
}

// TestTimeOfRetry: the time that a request waits to be sent again is one of the queue, even
// if it never comes to that.
func TestTimeOfRetry(t *testing.T) {
	w := newWire(t, target.Config{RetryDelays: [3]time.Duration{2 * time.Second}}, target.NamespaceConfig{})
	loops := newLoops(t, 1)
	c := connect(t, w.config(loops, poller.Request{IO: 1}))
	q, err := c.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	w.target.Faults().Add(target.Fault{Status: nvme.StatusInternal | 1<<11, Count: 1})
	if err := loops[0].Call(func() { q.Submit([]block.Request{{Op: block.OpRead, Sectors: 8}}) }); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the delay", func() bool { return c.Info().Lanes[0].Held == 1 })
	began := time.Now()
	waitFor(t, "some of the delay", func() bool { return time.Since(began) > 200*time.Millisecond })
	c.Abort(errors.New("the test is over"))
	var done [1]block.Result
	waitFor(t, "the end of the request", func() bool {
		n := 0
		loops[0].Call(func() { n = q.Reap(done[:]) })
		return n == 1
	})
	s := c.Info().Stages
	if queue, back := s[StageQueue][block.OpRead], s[StageReturn][block.OpRead]; done[0].Errno == 0 || queue.Sum < 200*time.Millisecond || back.Sum >= 200*time.Millisecond {
		t.Errorf("errno %d, %v in the queue, %v on the way back", done[0].Errno, queue.Sum, back.Sum)
	}
	q.Close()
	closeSubsystem(t, c)
}

// TestOldestCommand: a command that the target does not answer shows its age.
func TestOldestCommand(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, 1)
	cfg := w.config(loops, poller.Request{IO: 1})
	cfg.IOTimeout = time.Minute
	c := connect(t, cfg)
	q, err := c.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	w.target.Faults().Add(target.Fault{Delay: 3 * time.Second, Count: 1})
	if err := loops[0].Call(func() { q.Submit([]block.Request{{Op: block.OpRead, Sectors: 8}}) }); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a command of a second", func() bool { return c.Info().Oldest >= time.Second })
	var done [1]block.Result
	waitFor(t, "its end", func() bool {
		n := 0
		loops[0].Call(func() { n = q.Reap(done[:]) })
		return n == 1
	})
	waitFor(t, "no command", func() bool { return c.Info().Oldest == 0 })
	q.Close()
	closeSubsystem(t, c)
}

// BenchmarkSample is what the choice of the requests to time costs each request.
func BenchmarkSample(b *testing.B) {
	var s sampler
	b.ReportAllocs()
	timed := 0
	for b.Loop() {
		if s.sample(0) {
			timed++
		}
	}
	b.ReportMetric(float64(timed)*4/float64(b.N), "clock-reads/op")
}
