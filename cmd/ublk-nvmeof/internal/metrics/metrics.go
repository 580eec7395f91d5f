// Package metrics shows the status of servers to Prometheus. docs/metrics.md describes
// each metric; a test compares it with this package.
//
// Nothing is counted here. A scrape reads what the loops have counted anyway
// (control.Status), and the loops do not notice it.
package metrics

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// prefix begins the name of each metric.
const prefix = "ublk_nvmeof_"

// metric is one metric of this package.
type metric struct {
	*prometheus.Desc // nil before describe
	kind             prometheus.ValueType
	name, help       string
	labels           []string
}

// all has every metric of this package.
var all []*metric

// define defines a metric.
func define(kind prometheus.ValueType, name, help string, labels ...string) *metric {
	m := &metric{kind: kind, name: name, help: help, labels: labels}
	all = append(all, m)
	return m
}

// describe describes all metrics, once they are needed: to do so takes a part of each start of the
// program. Each metric has the labels server and nqn.
var describe = sync.OnceFunc(func() {
	for _, m := range all {
		m.Desc = prometheus.NewDesc(prefix+m.name, m.help, append([]string{"server", "nqn"}, m.labels...), nil)
	}
})

func counter(name, help string, labels ...string) *metric {
	return define(prometheus.CounterValue, name, help, labels...)
}

func gauge(name, help string, labels ...string) *metric {
	return define(prometheus.GaugeValue, name, help, labels...)
}

// histogram defines a histogram.
func histogram(name, help string, labels ...string) *metric {
	return define(prometheus.UntypedValue, name, help, labels...)
}

// The server and its controller.
var (
	up = gauge("up", "Whether the server of this subsystem runs and answers (1) or not (0).")

	controllerInfo = gauge("controller_info", "Always 1. The labels describe the controller and how it is reached.",
		"traddr", "trsvcid", "hostnqn", "model", "serial", "firmware", "frontend", "provider", "rdma_device")
	controllerState = gauge("controller_state", "1 for the present state of the controller, 0 for the other states.", "state")

	unavailable = counter("unavailable_seconds_total", "Time without a connection to the target, including that of a present outage. It begins when the loss is noticed.")
	losses      = counter("association_losses_total", "Number of times that the connection to the target was lost, by reason.", "reason")
	attempts    = counter("reconnect_attempts_total", "Number of attempts to connect to the target again.")
	reconnects  = counter("reconnects_total", "Number of attempts to connect to the target again that succeeded.")

	queuesRequested = gauge("queues_requested", "Number of I/O queues that were requested of the target, by class.", "class")
	queuesGranted   = gauge("queues_granted", "Number of I/O queues that the target granted, by class. A class without a queue is served by the default class.", "class")
	queueEntries    = gauge("queue_entries", "Number of entries of each I/O queue.")

	inFlight = gauge("requests_in_flight", "Number of requests that front ends have submitted and that have not ended, including those that are held.")
	held     = gauge("requests_held", "Number of requests that cannot be sent at present, because there is no connection, the namespace is missing, or the target asked to wait.")
	oldest   = gauge("oldest_command_seconds", "Age of the oldest command that the target has not answered, in whole seconds.")

	reserved        = gauge("reserved_bytes", "Address space of I/O buffers, registered or not.")
	registered      = gauge("registered_bytes", "Memory of I/O buffers that is registered with the RDMA device.")
	registeredLimit = gauge("registered_limit_bytes", "Largest amount of I/O buffers that the server reserves.")

	stages = histogram("request_stage_duration_seconds", "Duration of the stages of requests, by stage and operation. About one request in 64 is timed.", "stage", "operation")
)

// The paths: the controllers over which the subsystem is reached.
var (
	pathInfo      = gauge("path_info", "Always 1. The labels describe a path: where it leads, from where, and by what.", "path", "traddr", "trsvcid", "host_traddr", "provider", "rdma_device")
	pathState     = gauge("path_state", "1 for the present state of the path, 0 for the other states.", "path", "state")
	pathANA       = gauge("path_ana_state", "1 for the ANA state of a namespace over the path, 0 for the other states. It is missing if the controller reports none.", "path", "nsid", "state")
	pathInFlight  = gauge("path_requests_in_flight", "Number of requests that the queue pairs of the path have.", "path")
	pathFailovers = counter("path_failovers_total", "Number of requests that were in flight when the path was lost.", "path")
	pathHeld      = gauge("path_changes_held", "Number of writes, zeroes and discards with unknown outcome that wait until the target has ended the path's old controllers.", "path")
	pathLosses    = counter("path_losses_total", "Number of times that the path was lost.", "path")
	pathVouches   = gauge("path_vouches", "Number of other paths whose controllers the target of the path knows, so that it can say when they are gone.", "path")
)

// The loops.
var (
	loopSeconds    = counter("loop_seconds_total", "How a loop has spent its time: busy, spinning while it waits for an answer, or asleep.", "loop", "mode")
	loopPasses     = counter("loop_passes_total", "Number of passes of a loop over its queues.", "loop")
	loopEnters     = counter("loop_enters_total", "Number of io_uring_enter system calls of a loop.", "loop")
	loopRequests   = counter("loop_requests_total", "Number of requests that front ends have submitted on a loop.", "loop")
	loopHandedOver = counter("loop_requests_handed_over_total", "Number of requests submitted on a loop that a queue of another loop has served.", "loop")
	loopRetries    = counter("loop_command_retries_total", "Number of commands that were sent again after an error status.", "loop")
)

// The block devices.
var (
	deviceInfo = gauge("device_info", "Always 1. The labels describe the device and its namespace.", "device", "nsid", "uuid", "read_only")
	present    = gauge("device_present", "Whether the target has the namespace of the device, so that its requests are sent (1), or not (0).", "device")
	capacity   = gauge("device_capacity_bytes", "Size of the device.", "device")

	requests  = counter("requests_total", "Number of requests that have ended, including failed ones, by operation.", "device", "operation")
	moved     = counter("request_bytes_total", "Number of bytes of the reads and writes that have succeeded.", "device", "operation")
	uncopied  = counter("request_direct_bytes_total", "Number of those bytes that were not copied, because they were in memory of guests or programs that is registered.", "device")
	failed    = counter("request_errors_total", "Number of requests that have ended with an error, by operation. Those that are refused before they have an operation are counted as other.", "device", "operation")
	durations = histogram("request_duration_seconds", "Duration of requests from their submission by the front end to their result, by operation. About one request in 64 is timed.", "device", "operation")
)

// The RoCEv2 of the server's own. They are missing if an RDMA device does the work.
var (
	packets       = counter("roce_packets_total", "Number of RoCEv2 packets, by direction. Received packets are counted if they are valid.", "direction")
	retransmitted = counter("roce_retransmitted_packets_total", "Number of RoCEv2 packets that were sent again.")
	timeouts      = counter("roce_timeouts_total", "Number of times that the retransmission timer of a queue pair expired without progress.")
	outOfSequence = counter("roce_out_of_sequence_packets_total", "Number of RoCEv2 packets that were received after a gap.")
	duplicates    = counter("roce_duplicate_packets_total", "Number of RoCEv2 requests that were received again.")
	naks          = counter("roce_sequence_naks_total", "Number of negative acknowledgements for a sequence error, by direction.", "direction")
	rnrNAKs       = counter("roce_rnr_naks_received_total", "Number of negative acknowledgements received because the target was not ready to receive.")
	dropped       = counter("roce_dropped_packets_total", "Number of received packets that were dropped, by reason.", "reason")
	congestion    = counter("roce_congestion_signals_total", "Number of packets that met congestion, and of congestion notifications received.")
)

// states are the values of the label state.
var states = []string{"new", "live", "connecting", "deleting", "dead", "lost", "unknown"}

// down are the states of servers that do not answer.
var down = []string{"lost", "unknown"}

// pathStates and anaStates are the values of the label state of a path.
var (
	pathStates = []string{"new", "live", "connecting", "deleting", "dead"}
	anaStates  = []string{"optimized", "non-optimized", "inaccessible", "persistent-loss", "change"}
)

// operations are the values of the label operation, except "other".
var operations = []string{"read", "write", "flush", "discard", "write_zeroes"}

// collector collects the metrics of servers.
type collector func() []control.Status

// Describe implements prometheus.Collector. A registry calls it before it collects anything.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	describe()
	for _, m := range all {
		out <- m.Desc
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c() {
		e := &exposition{out, []string{clean(s.Name), clean(s.NQN)}}
		e.server(&s)
		if slices.Contains(down, s.State) {
			continue
		}
		e.controller(&s)
		for _, p := range s.Paths {
			e.path(p)
		}
		for i, l := range s.Lanes {
			e.loop(label(i), l)
		}
		for _, d := range s.Devices {
			e.device(d, s.DurationBounds)
		}
		if s.Packets != nil {
			e.packets(s.Packets)
		}
	}
}

// Handler answers the scrapes of one server. It adds the metrics of its process.
func Handler(status func() control.Status) http.Handler {
	return handler(func() *prometheus.Registry {
		r := registry(func() []control.Status { return []control.Status{status()} })
		r.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
		return r
	})
}

// HandlerOfAll answers scrapes with the metrics of several servers.
func HandlerOfAll(servers func() []control.Status) http.Handler {
	return handler(func() *prometheus.Registry { return registry(servers) })
}

// handler answers scrapes. The first one makes the registry.
func handler(registry func() *prometheus.Registry) http.Handler {
	made := sync.OnceValue(func() http.Handler {
		// Compression would take a fifth of the CPU time of a scrape, on a machine that needs it for I/O.
		return promhttp.HandlerFor(registry(), promhttp.HandlerOpts{DisableCompression: true})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { made().ServeHTTP(w, r) })
}

// Write writes the metrics of servers in the text format.
func Write(w io.Writer, servers []control.Status) error {
	families, err := registry(func() []control.Status { return servers }).Gather()
	if err != nil {
		return err
	}
	e := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := e.Encode(f); err != nil {
			return err
		}
	}
	return nil
}

func registry(servers func() []control.Status) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collector(servers))
	return r
}

// clean makes a label of text that a target may have chosen. A terminal may show it.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// sorted are the keys of a map in order.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
