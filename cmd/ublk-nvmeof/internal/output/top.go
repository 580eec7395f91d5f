package output

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// Sample is the status of all servers at one time.
type Sample struct {
	Time    time.Time
	Servers []control.Status
}

// top is what happened between two samples. Rates are per second, times in seconds.
type top struct {
	SchemaVersion int         `json:"schema_version"`
	Time          string      `json:"time"`     // of the second sample, RFC 3339
	Interval      float64     `json:"interval"` // between the samples
	Servers       []topServer `json:"servers"`
}

type topServer struct {
	Server      string         `json:"server"`
	NQN         string         `json:"subsysnqn"`
	State       string         `json:"state"`
	Queues      control.Queues `json:"queues"`
	InFlight    int64          `json:"in_flight"`
	Held        int64          `json:"held"`
	Oldest      float64        `json:"oldest_command"`
	Unavailable float64        `json:"unavailable"` // in all
	Losses      int            `json:"losses"`      // in all
	Devices     []topDevice    `json:"devices"`
	Loops       []topLoop      `json:"loops"`
}

type topDevice struct {
	Device string  `json:"device"`
	NSID   uint32  `json:"nsid"`
	Read   topOp   `json:"read"`
	Write  topOp   `json:"write"`
	Other  float64 `json:"other_rate"` // flushes, discards, write zeroes
	Errors float64 `json:"error_rate"`
}

type topOp struct {
	Rate  float64 `json:"rate"`
	Bytes float64 `json:"byte_rate"`
	// P50 and P99 are null if no request was timed.
	P50 *float64 `json:"p50"`
	P99 *float64 `json:"p99"`
}

type topLoop struct {
	Loop     int     `json:"loop"`
	Requests float64 `json:"request_rate"`
	// Shares of the time.
	Busy  float64 `json:"busy"`
	Spin  float64 `json:"spin"`
	Sleep float64 `json:"sleep"`
}

// Top writes what happened between two samples.
func Top(w io.Writer, before, after Sample, format string) error {
	t := compare(before, after)
	if format == JSON {
		return writeJSON(w, t)
	}
	return topTables(w, printable(t))
}

// compare computes rates. Those of a server or device that is new are 0.
func compare(before, after Sample) top {
	seconds := after.Time.Sub(before.Time).Seconds()
	t := top{SchemaVersion: SchemaVersion, Time: after.Time.Format(time.RFC3339), Interval: seconds, Servers: []topServer{}}
	for _, s := range after.Servers {
		i := slices.IndexFunc(before.Servers, func(b control.Status) bool { return b.Name == s.Name && b.PID == s.PID })
		was := s // nothing is known of the time before
		if i >= 0 {
			was = before.Servers[i]
		}
		t.Servers = append(t.Servers, compareServers(&was, &s, seconds))
	}
	return t
}

func compareServers(was, is *control.Status, seconds float64) topServer {
	out := topServer{
		Server: is.Name, NQN: is.NQN, State: is.State, Queues: is.Queues, InFlight: is.Requests.InFlight, Held: is.Requests.Held,
		Oldest: is.Requests.Oldest, Unavailable: is.Outages.Unavailable, Losses: is.Losses,
		Devices: []topDevice{}, Loops: []topLoop{},
	}
	for _, d := range is.Devices {
		i := slices.IndexFunc(was.Devices, func(b control.Device) bool { return b.Device == d.Device && b.NSID == d.NSID })
		old := d
		if i >= 0 {
			old = was.Devices[i]
		}
		out.Devices = append(out.Devices, compareDevices(&old, &d, is.DurationBounds, seconds))
	}
	for i, l := range is.Lanes {
		old := l
		if i < len(was.Lanes) {
			old = was.Lanes[i]
		}
		out.Loops = append(out.Loops, topLoop{
			Loop: i, Requests: rate(old.Submitted, l.Submitted, seconds),
			Busy: (l.Busy - old.Busy) / seconds, Spin: (l.Spin - old.Spin) / seconds, Sleep: (l.Sleep - old.Sleep) / seconds,
		})
	}
	return out
}

func compareDevices(was, is *control.Device, bounds []float64, seconds float64) topDevice {
	a, b := &was.Counters, &is.Counters
	return topDevice{
		Device: is.Device, NSID: is.NSID,
		Read: topOp{
			Rate: rate(a.Reads, b.Reads, seconds), Bytes: rate(a.ReadBytes, b.ReadBytes, seconds),
			P50: quantile(0.5, was.Durations["read"], is.Durations["read"], bounds),
			P99: quantile(0.99, was.Durations["read"], is.Durations["read"], bounds),
		},
		Write: topOp{
			Rate: rate(a.Writes, b.Writes, seconds), Bytes: rate(a.WrittenBytes, b.WrittenBytes, seconds),
			P50: quantile(0.5, was.Durations["write"], is.Durations["write"], bounds),
			P99: quantile(0.99, was.Durations["write"], is.Durations["write"], bounds),
		},
		Other:  rate(a.Flushes+a.Discards+a.WriteZeroes, b.Flushes+b.Discards+b.WriteZeroes, seconds),
		Errors: rate(a.Errors, b.Errors, seconds),
	}
}

// rate returns the growth of a counter per second. A counter that has become smaller has
// begun anew.
func rate(was, is uint64, seconds float64) float64 {
	if is < was {
		was = 0
	}
	return float64(is-was) / seconds
}

// quantile estimates a quantile of the requests that were timed between two samples, as
// Prometheus' histogram_quantile does. Without such requests it is nil.
func quantile(q float64, was, is control.Durations, bounds []float64) *float64 {
	n := make([]float64, len(is.Buckets))
	total := 0.0
	for i, b := range is.Buckets {
		if i < len(was.Buckets) && was.Buckets[i] <= b {
			b -= was.Buckets[i]
		}
		n[i] = float64(b)
		total += n[i]
	}
	if total == 0 {
		return nil
	}
	rank, low := q*total, 0.0
	for i, bound := range bounds {
		if i < len(n) && rank <= n[i] {
			v := low + (bound-low)*rank/n[i]
			return &v
		}
		if i < len(n) {
			rank -= n[i]
		}
		low = bound
	}
	return &low // beyond the last bound
}

func topTables(out io.Writer, t top) error {
	devices := 0
	for _, s := range t.Servers {
		devices += len(s.Devices)
	}
	if _, err := fmt.Fprintf(out, "%s, %.1f s: %d servers, %d devices\n\n", t.Time, t.Interval, len(t.Servers), devices); err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SERVER\tSTATE\tIN FLIGHT\tHELD\tOLDEST\tLOST\tUNAVAILABLE\tQUEUES (REQUESTED/GRANTED)\tNQN")
	for _, s := range t.Servers {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%d\t%s\t%s\t%s\n", s.Server, s.State, s.InFlight, s.Held, shortTime(&s.Oldest),
			s.Losses, shortTime(&s.Unavailable), summary(s.Queues), orNone(s.NQN))
	}
	fmt.Fprintln(w)
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "DEVICE\tREADS/S\tREAD/S\tP50\tP99\tWRITES/S\tWRITTEN/S\tP50\tP99\tOTHER/S\tERRORS/S")
	for _, s := range t.Servers {
		for _, d := range s.Devices {
			path := control.Device{Device: d.Device}.Path()
			fmt.Fprintf(w, "%s\t%s\t%s\t%.1f\t%.1f\n", path, topOpText(d.Read), topOpText(d.Write), d.Other, d.Errors)
		}
	}
	fmt.Fprintln(w)
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "LOOP\tREQUESTS/S\tBUSY\tSPIN\tSLEEP")
	for _, s := range t.Servers {
		for _, l := range s.Loops {
			fmt.Fprintf(w, "%s/%d\t%.0f\t%.1f%%\t%.1f%%\t%.1f%%\n", s.Server, l.Loop, l.Requests, 100*l.Busy, 100*l.Spin, 100*l.Sleep)
		}
	}
	fmt.Fprintln(w)
	return w.Flush()
}

func topOpText(o topOp) string {
	return fmt.Sprintf("%.0f\t%s\t%s\t%s", o.Rate, humanize.IBytes(uint64(o.Bytes)), shortTime(o.P50), shortTime(o.P99))
}

// shortTime writes seconds with about three digits.
func shortTime(seconds *float64) string {
	if seconds == nil {
		return none
	}
	d := time.Duration(*seconds * float64(time.Second))
	switch {
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}
