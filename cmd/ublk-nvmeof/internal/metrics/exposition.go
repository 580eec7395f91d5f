package metrics

import (
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// exposition sends the metrics of one server.
type exposition struct {
	out    chan<- prometheus.Metric
	labels []string // server and nqn
}

func (e *exposition) add(m *metric, value float64, labels ...string) {
	v, err := prometheus.NewConstMetric(m.Desc, m.kind, value, append(slices.Clip(e.labels), labels...)...)
	if err != nil {
		v = prometheus.NewInvalidMetric(m.Desc, err)
	}
	e.out <- v
}

// addHistogram sends a histogram. d has no buckets if no request was timed.
func (e *exposition) addHistogram(m *metric, d control.Durations, bounds []float64, labels ...string) {
	buckets := make(map[float64]uint64, len(bounds))
	n := uint64(0)
	for i, bound := range bounds {
		if i < len(d.Buckets) {
			n += d.Buckets[i]
		}
		buckets[bound] = n
	}
	if len(d.Buckets) > len(bounds) {
		n += d.Buckets[len(bounds)]
	}
	v, err := prometheus.NewConstHistogram(m.Desc, n, d.Sum, buckets, append(slices.Clip(e.labels), labels...)...)
	if err != nil {
		v = prometheus.NewInvalidMetric(m.Desc, err)
	}
	e.out <- v
}

// timed returns the operations to show histograms of: reads, writes, and others of which
// a request was timed. Histograms are most of an exposition, and most devices see few
// operations.
func timed(d map[string]control.Durations) []string {
	return slices.DeleteFunc(slices.Clone(operations), func(op string) bool {
		return op != "read" && op != "write" && len(d[op].Buckets) == 0
	})
}

func (e *exposition) server(s *control.Status) {
	e.add(up, truth(!slices.Contains(down, s.State)))
	for _, state := range states {
		e.add(controllerState, truth(state == s.State), state)
	}
}

func (e *exposition) controller(s *control.Status) {
	e.add(controllerInfo, 1, clean(s.TrAddr), clean(s.TrSvcID), clean(s.HostNQN), clean(s.Model), clean(s.Serial), clean(s.Firmware),
		clean(s.Frontend), clean(s.Provider), clean(s.RDMADevice))
	e.add(unavailable, s.Outages.Unavailable)
	for _, reason := range sorted(s.Outages.Losses) {
		e.add(losses, float64(s.Outages.Losses[reason]), clean(reason))
	}
	e.add(attempts, float64(s.Outages.Attempts))
	e.add(reconnects, float64(s.Outages.Reconnects))
	for name, class := range map[string]control.Class{"read": s.Queues.Read, "default": s.Queues.Default, "poll": s.Queues.Poll} {
		e.add(queuesRequested, float64(class.Requested), name)
		e.add(queuesGranted, float64(class.Granted), name)
	}
	e.add(queueEntries, float64(s.QueueSize))
	e.add(inFlight, float64(s.Requests.InFlight))
	e.add(held, float64(s.Requests.Held))
	e.add(oldest, s.Requests.Oldest)
	e.add(reserved, float64(s.ReservedBytes))
	e.add(registered, float64(s.RegisteredBytes))
	e.add(registeredLimit, float64(s.RegisteredLimit))
	for stage, of := range s.Stages {
		for _, op := range timed(of) {
			e.addHistogram(stages, of[op], s.DurationBounds, clean(stage), op)
		}
	}
}

func (e *exposition) path(p control.Path) {
	e.add(pathInfo, 1, p.Path, p.TrAddr, p.TrSvcID, p.HostTrAddr, clean(p.Provider), clean(p.RDMADevice))
	for _, state := range pathStates {
		e.add(pathState, truth(state == p.State), p.Path, state)
	}
	for _, nsid := range sorted(p.ANA) {
		for _, state := range anaStates {
			e.add(pathANA, truth(state == p.ANA[nsid]), p.Path, nsid, state)
		}
	}
	e.add(pathInFlight, float64(p.InFlight), p.Path)
	e.add(pathFailovers, float64(p.Failovers), p.Path)
	e.add(pathHeld, float64(p.Held), p.Path)
	e.add(pathLosses, float64(p.Losses), p.Path)
	e.add(pathVouches, float64(len(p.Vouched)), p.Path)
}

func (e *exposition) loop(number string, l control.Lane) {
	e.add(loopSeconds, l.Busy, number, "busy")
	e.add(loopSeconds, l.Spin, number, "spin")
	e.add(loopSeconds, l.Sleep, number, "sleep")
	e.add(loopPasses, float64(l.Passes), number)
	e.add(loopEnters, float64(l.Enters), number)
	e.add(loopRequests, float64(l.Submitted), number)
	e.add(loopHandedOver, float64(l.HandedOver), number)
	e.add(loopRetries, float64(l.Retried), number)
}

func (e *exposition) device(d control.Device, bounds []float64) {
	name, n := clean(d.Device), &d.Counters
	e.add(deviceInfo, 1, name, strconv.FormatUint(uint64(d.NSID), 10), clean(d.UUID), strconv.FormatBool(d.ReadOnly))
	e.add(present, truth(d.Present), name)
	e.add(capacity, float64(d.Size), name)
	failures := uint64(0)
	for i, c := range []struct{ requests, failed uint64 }{
		{n.Reads, n.Failed.Reads}, {n.Writes, n.Failed.Writes}, {n.Flushes, n.Failed.Flushes},
		{n.Discards, n.Failed.Discards}, {n.WriteZeroes, n.Failed.WriteZeroes},
	} {
		e.add(requests, float64(c.requests), name, operations[i])
		e.add(failed, float64(c.failed), name, operations[i])
		failures += c.failed
	}
	e.add(failed, float64(max(n.Errors, failures)-failures), name, "other")
	e.add(moved, float64(n.ReadBytes), name, "read")
	e.add(moved, float64(n.WrittenBytes), name, "write")
	e.add(uncopied, float64(n.DirectBytes), name)
	for _, op := range timed(d.Durations) {
		e.addHistogram(durations, d.Durations[op], bounds, name, op)
	}
}

func (e *exposition) packets(p *control.Packets) {
	e.add(packets, float64(p.Sent), "sent")
	e.add(packets, float64(p.Received), "received")
	e.add(retransmitted, float64(p.Retransmitted))
	e.add(timeouts, float64(p.Timeouts))
	e.add(outOfSequence, float64(p.OutOfSequence))
	e.add(duplicates, float64(p.Duplicates))
	e.add(naks, float64(p.NAKsSent), "sent")
	e.add(naks, float64(p.NAKsReceived), "received")
	e.add(rnrNAKs, float64(p.RNRNAKs))
	for _, reason := range sorted(p.DroppedBy) {
		e.add(dropped, float64(p.DroppedBy[reason]), clean(reason))
	}
	e.add(congestion, float64(p.Congestion))
}

func label(n int) string { return strconv.Itoa(n) }

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
