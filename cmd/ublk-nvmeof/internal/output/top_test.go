package output

import (
	"bytes"
	"encoding/json"
	"math"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// samples are two samples of one server, two seconds apart.
func samples() (before, after Sample) {
	bounds := []float64{0.001, 0.01, 1}
	before = Sample{Time: time.Unix(1_000_000_000, 0).UTC(), Servers: []control.Status{live}}
	now := live
	now.Requests = control.Requests{InFlight: 32, Held: 1, Oldest: 3}
	now.Outages.Unavailable, now.Losses, now.DurationBounds = 61.5, 2, bounds
	now.Devices = append([]control.Device(nil), live.Devices...)
	d := &now.Devices[0]
	d.Counters.Reads += 2000
	d.Counters.ReadBytes += 2000 * 4096
	d.Counters.Writes += 10
	d.Counters.WrittenBytes += 10 << 20
	d.Counters.Flushes += 3
	d.Counters.Errors += 4
	d.Durations = map[string]control.Durations{"read": {Buckets: []uint64{10, 85, 4, 1}}}
	now.Lanes = append([]control.Lane(nil), live.Lanes...)
	now.Lanes[0].Submitted += 2013
	now.Lanes[0].Busy, now.Lanes[0].Spin, now.Lanes[0].Sleep = 1, 0.5, 0.5
	after = Sample{Time: before.Time.Add(2 * time.Second), Servers: []control.Status{now, connecting}}
	return before, after
}

func TestTopGolden(t *testing.T) {
	for file, format := range map[string]string{"top.txt": Normal, "top.json": JSON} {
		before, after := samples()
		var b bytes.Buffer
		if err := Top(&b, before, after, format); err != nil {
			t.Fatal(err)
		}
		golden(t, file, b.Bytes())
		if format == JSON && !json.Valid(b.Bytes()) {
			t.Error("not JSON")
		}
	}
}

// TestTopOfAnotherServer: a server that has the name of a former one begins anew, and so
// does a counter that has become smaller.
func TestTopOfAnotherServer(t *testing.T) {
	before, after := samples()
	after.Servers[0].PID++
	if got := compare(before, after).Servers[0]; got.Devices[0].Read.Rate != 0 || got.Loops[0].Requests != 0 || got.Loops[0].Busy != 0 {
		t.Errorf("%+v", got)
	}
	if got := rate(100, 10, 2); got != 5 {
		t.Errorf("rate %v of a counter that began anew, want 5", got)
	}
}

func TestQuantile(t *testing.T) {
	bounds := []float64{1, 2, 4}
	for _, tt := range []struct {
		q       float64
		was, is []uint64
		want    float64 // NaN: none
	}{
		{0.5, nil, nil, math.NaN()},
		{0.5, []uint64{5, 0, 0, 0}, []uint64{5, 0, 0, 0}, math.NaN()},
		{0.5, nil, []uint64{10, 0, 0, 0}, 0.5},
		{0.5, []uint64{10, 0, 0, 0}, []uint64{10, 10, 0, 0}, 1.5},
		{0.5, nil, []uint64{1, 0, 1, 0}, 1},
		{0.99, nil, []uint64{0, 0, 100, 0}, 3.98},
		{0.99, nil, []uint64{0, 0, 0, 7}, 4},
		{0.5, []uint64{9, 9, 9, 9}, []uint64{2, 0, 0, 0}, 0.5}, // began anew
	} {
		got := quantile(tt.q, control.Durations{Buckets: tt.was}, control.Durations{Buckets: tt.is}, bounds)
		switch {
		case got == nil:
			if !math.IsNaN(tt.want) {
				t.Errorf("%v of %v after %v: none, want %v", tt.q, tt.is, tt.was, tt.want)
			}
		case math.Abs(*got-tt.want) > 1e-9:
			t.Errorf("%v of %v after %v: %v, want %v", tt.q, tt.is, tt.was, *got, tt.want)
		}
	}
}
