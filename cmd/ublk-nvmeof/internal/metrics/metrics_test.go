package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// server is the status of a server with the given number of devices, in which everything
// that a metric shows is different from 0.
func server(name string, devices int) control.Status {
	bounds := []float64{1e-05, 0.001, 1}
	durations := map[string]control.Durations{"read": {Buckets: []uint64{1, 2, 3, 4}, Sum: 12.5}}
	s := control.Status{
		Name: name, NQN: "nqn.2026-01.org.example:disk", HostNQN: "nqn.host", TrAddr: "10.0.2.15", TrSvcID: "4420", State: "live",
		Model: "Linux", Serial: "0123", Firmware: "6.12", Frontend: "ublk", Provider: "roce", RDMADevice: "roce", QueueSize: 128,
		Queues: control.Queues{
			Requested: 4, Granted: 3, Read: control.Class{Requested: 2, Granted: 2}, Default: control.Class{Requested: 1, Granted: 1},
			Poll: control.Class{Requested: 1},
		},
		Outages:       control.Outages{Unavailable: 1.5, Losses: map[string]int{"keep_alive": 2, "disconnected": 0}, Attempts: 7, Reconnects: 2},
		Requests:      control.Requests{InFlight: 5, Held: 1, Oldest: 3},
		ReservedBytes: 1 << 27, RegisteredBytes: 1 << 26, RegisteredLimit: 1 << 30,
		DurationBounds: bounds, Stages: map[string]map[string]control.Durations{"queue": durations, "wire": durations, "return": durations},
		Paths: []control.Path{
			{
				Path: "10.0.2.15", TrAddr: "10.0.2.15", TrSvcID: "4420", State: "live", Provider: "roce", RDMADevice: "roce", ANA: map[string]string{"1": "optimized"},
				InFlight: 4, Failovers: 3, Losses: 2, Vouched: []string{"10.0.3.15:4420"},
			},
			{Path: "10.0.3.15,4421,10.0.3.2", TrAddr: "10.0.3.15", TrSvcID: "4421", HostTrAddr: "10.0.3.2", State: "connecting", Held: 6},
		},
		Lanes: []control.Lane{{Submitted: 10, HandedOver: 2, Retried: 1, Passes: 100, Enters: 50, Busy: 1, Spin: 2, Sleep: 3}},
		Packets: &control.Packets{
			Sent: 1, Received: 2, Retransmitted: 3, Timeouts: 4, OutOfSequence: 5, Duplicates: 6, NAKsSent: 7, NAKsReceived: 8, RNRNAKs: 9,
			DroppedBy: map[string]uint64{"malformed": 10}, Congestion: 11,
		},
	}
	for i := range devices {
		s.Devices = append(s.Devices, control.Device{
			Device: fmt.Sprintf("ublkb%d", i), NSID: uint32(i + 1), UUID: "22222222-2222-2222-2222-222222222222", Size: 1 << 30, Present: true,
			Counters: control.IO{
				Reads: 10, ReadBytes: 40960, Writes: 3, WrittenBytes: 1 << 20, DirectBytes: 8192, Flushes: 1, Errors: 3,
				Failed: control.Failures{Reads: 2},
			},
			Durations: durations,
		})
	}
	return s
}

func serve(servers ...control.Status) collector { return func() []control.Status { return servers } }

// TestConventions: names, types and texts are as Prometheus' own tools want them, and
// every metric is collected as it is described.
func TestConventions(t *testing.T) {
	c := serve(server("ctrl0", 2), server("ctrl1", 0))
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != len(all) {
		t.Errorf("%d metrics are collected, %d are described", len(families), len(all))
	}
	for _, f := range families {
		if h := f.GetHelp(); !strings.HasSuffix(h, ".") {
			t.Errorf("%s: %q is no sentence", f.GetName(), h)
		}
	}
}

// TestValues: what a metric shows, by example.
func TestValues(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, []control.Status{server("ctrl0", 1)}); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if strings.Contains(text, `ublk_nvmeof_request_duration_seconds_count{device="ublkb0",nqn="nqn.2026-01.org.example:disk",operation="flush"`) {
		t.Error("there is a histogram of an operation that was never timed")
	}
	for _, want := range []string{
		`ublk_nvmeof_up{NQN} 1`,
		`ublk_nvmeof_controller_state{NQN,state="live"} 1`,
		`ublk_nvmeof_controller_state{NQN,state="connecting"} 0`,
		`ublk_nvmeof_unavailable_seconds_total{NQN} 1.5`,
		`ublk_nvmeof_association_losses_total{NQN,reason="keep_alive"} 2`,
		`ublk_nvmeof_association_losses_total{NQN,reason="disconnected"} 0`,
		`ublk_nvmeof_reconnect_attempts_total{NQN} 7`,
		`ublk_nvmeof_queues_requested{NQN,class="poll"} 1`,
		`ublk_nvmeof_queues_granted{NQN,class="poll"} 0`,
		`ublk_nvmeof_requests_in_flight{NQN} 5`,
		`ublk_nvmeof_requests_held{NQN} 1`,
		`ublk_nvmeof_path_info{NQN,host_traddr="10.0.3.2",path="10.0.3.15,4421,10.0.3.2",provider="",rdma_device="",traddr="10.0.3.15",trsvcid="4421"} 1`,
		`ublk_nvmeof_path_state{NQN,path="10.0.2.15",state="live"} 1`,
		`ublk_nvmeof_path_state{NQN,path="10.0.2.15",state="connecting"} 0`,
		`ublk_nvmeof_path_ana_state{NQN,nsid="1",path="10.0.2.15",state="optimized"} 1`,
		`ublk_nvmeof_path_ana_state{NQN,nsid="1",path="10.0.2.15",state="change"} 0`,
		`ublk_nvmeof_path_requests_in_flight{NQN,path="10.0.2.15"} 4`,
		`ublk_nvmeof_path_failovers_total{NQN,path="10.0.2.15"} 3`,
		`ublk_nvmeof_path_changes_held{NQN,path="10.0.3.15,4421,10.0.3.2"} 6`,
		`ublk_nvmeof_path_losses_total{NQN,path="10.0.2.15"} 2`,
		`ublk_nvmeof_path_vouches{NQN,path="10.0.2.15"} 1`,
		`ublk_nvmeof_loop_seconds_total{NQN,loop="0",mode="spin"} 2`,
		`ublk_nvmeof_requests_total{NQN,device="ublkb0",operation="read"} 10`,
		`ublk_nvmeof_request_errors_total{NQN,device="ublkb0",operation="read"} 2`,
		`ublk_nvmeof_request_errors_total{NQN,device="ublkb0",operation="other"} 1`,
		`ublk_nvmeof_request_bytes_total{NQN,device="ublkb0",operation="write"} 1.048576e+06`,
		`ublk_nvmeof_request_direct_bytes_total{NQN,device="ublkb0"} 8192`,
		`ublk_nvmeof_request_duration_seconds_bucket{NQN,device="ublkb0",operation="read",le="0.001"} 3`,
		`ublk_nvmeof_request_duration_seconds_bucket{NQN,device="ublkb0",operation="read",le="+Inf"} 10`,
		`ublk_nvmeof_request_duration_seconds_sum{NQN,device="ublkb0",operation="read"} 12.5`,
		`ublk_nvmeof_request_duration_seconds_count{NQN,device="ublkb0",operation="write"} 0`,
		`ublk_nvmeof_request_stage_duration_seconds_count{NQN,operation="read",stage="wire"} 10`,
		`ublk_nvmeof_roce_packets_total{NQN,direction="received"} 2`,
		`ublk_nvmeof_roce_dropped_packets_total{NQN,reason="malformed"} 10`,
	} {
		want = strings.Replace(want, "NQN", `server="ctrl0",nqn="nqn.2026-01.org.example:disk"`, 1)
		if !slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool { return sameSeries(line, want) }) {
			t.Errorf("missing: %s", want)
		}
	}
}

var labels = regexp.MustCompile(`[a-z_]+="[^"]*"`)

// sameSeries reports whether two lines are equal but for the order of the labels.
func sameSeries(a, b string) bool {
	la, lb := labels.FindAllString(a, -1), labels.FindAllString(b, -1)
	slices.Sort(la)
	slices.Sort(lb)
	return slices.Equal(la, lb) && labels.ReplaceAllString(a, "") == labels.ReplaceAllString(b, "")
}

// TestDown: of a server that does not answer it is known that it is down, and no counter
// is shown.
func TestDown(t *testing.T) {
	for _, state := range []string{"lost", "unknown"} {
		var b bytes.Buffer
		if err := Write(&b, []control.Status{{Name: "ctrl0", NQN: "nqn.x", State: state}}); err != nil {
			t.Fatal(err)
		}
		text := b.String()
		if !strings.Contains(text, `ublk_nvmeof_up{nqn="nqn.x",server="ctrl0"} 0`) || strings.Contains(text, "_total") {
			t.Errorf("%s:\n%s", state, text)
		}
	}
}

// TestHostileText: what a target says about itself cannot break the exposition.
func TestHostileText(t *testing.T) {
	const nasty = "a\"b\\c\n# TYPE x counter\nx 1 \xff\x00\x1b[2J\u202e"
	s := server("ctrl0", 1)
	s.Model, s.Serial, s.Firmware, s.NQN, s.Devices[0].Device = nasty, nasty, nasty, nasty, nasty
	s.Outages.Losses[nasty] = 1
	var b bytes.Buffer
	if err := Write(&b, []control.Status{s}); err != nil {
		t.Fatal(err)
	}
	out := b.String()
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(&b)
	if err != nil {
		t.Fatal(err)
	}
	if families["x"] != nil || len(families) != len(all) {
		t.Errorf("%d metrics", len(families))
	}
	if text := strings.ReplaceAll(out, "\n", ""); strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("a terminal would obey %q", text)
	}
}

// TestHandler: a scrape has the metrics of the server and of its process.
func TestHandler(t *testing.T) {
	h := Handler(func() control.Status { return server("ctrl0", 1) })
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	text := w.Body.String()
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Errorf("%d, %v", w.Code, w.Header())
	}
	for _, want := range []string{"\nublk_nvmeof_up{", "\nprocess_cpu_seconds_total "} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q", want)
		}
	}
}

// TestWriteFails: an error of the writer is returned.
func TestWriteFails(t *testing.T) {
	r, w := io.Pipe()
	r.CloseWithError(errors.New("nobody reads"))
	if err := Write(w, []control.Status{server("ctrl0", 1)}); err == nil {
		t.Error("no error")
	}
}

var documented = regexp.MustCompile("(?m)^\\| `(" + prefix + "[a-z_]+)` \\| (counter|gauge|histogram) \\|")

// TestDocumented compares the metrics with docs/metrics.md.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, m := range documented.FindAllStringSubmatch(string(text), -1) {
		found[m[1]] = m[2]
	}
	r := prometheus.NewRegistry()
	r.MustRegister(serve(server("ctrl0", 1)))
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		want := strings.ToLower(f.GetType().String())
		if got := found[f.GetName()]; got != want {
			t.Errorf("%s, a %s, is documented as %q", f.GetName(), want, got)
		}
		delete(found, f.GetName())
	}
	for name := range found {
		t.Errorf("%s is documented and does not exist", name)
	}
}

func BenchmarkScrape(b *testing.B) {
	for _, n := range []int{1, 32} {
		b.Run(fmt.Sprintf("%d-devices", n), func(b *testing.B) {
			h := Handler(func() control.Status { return server("ctrl0", n) })
			b.ReportAllocs()
			size := 0
			for b.Loop() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
				size = w.Body.Len()
			}
			b.ReportMetric(float64(size), "bytes")
		})
	}
}
