package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/internal/testenv"
)

// sum adds the values of a metric whose labels contain all of with.
func sum(text, name string, with ...string) (total float64, found bool) {
next:
	for line := range strings.SplitSeq(text, "\n") {
		if !strings.HasPrefix(line, name+"{") {
			continue
		}
		for _, w := range with {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		v, err := strconv.ParseFloat(line[strings.LastIndex(line, " ")+1:], 64)
		if err != nil {
			continue
		}
		total, found = total+v, true
	}
	return total, found
}

// scrape gets a path of a server at an address.
func scrape(t *testing.T, network, address, path string) (string, int) {
	t.Helper()
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}
	resp, err := c.Get("http://server" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text), resp.StatusCode
}

// freePort is a port of an address on which nobody listens.
func freePort(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// measured is a server of 32 namespaces, whose metrics are looked at.
type measured struct {
	*testing.T
	dir, nqn, address string   // address of the metrics
	target            []string // the command that starts the target
	device            string   // of namespace 1
	client            *nbdClient
}

// un runs the program and returns what it writes.
func (m *measured) un(args ...string) string {
	m.Helper()
	out, errs, code := execProgram(m.T, append([]string{"--run-dir", m.dir}, args...)...)
	if code != exit.OK {
		m.Fatalf("%q: exit code %d, %s", args, code, errs)
	}
	return out
}

// await scrapes until the metrics are as they have to be.
func (m *measured) await(what string, ok func(text string) bool) string {
	m.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		text, _ := scrape(m.T, "tcp", m.address, "/metrics")
		if ok(text) {
			return text
		}
		if time.Now().After(deadline) {
			m.Fatalf("%s did not come:\n%s", what, text)
		}
	}
}

func newMeasured(t *testing.T) *measured {
	const namespaces = 32
	m := &measured{T: t, dir: runDir(t), nqn: "nqn.2026-01.org.example:metrics"}
	m.address = net.JoinHostPort(loopback(), freePort(t, loopback()))
	m.target = []string{"target", "-a", loopback(), "-s", "4423", "--provider", "roce", "--background", "-n", m.nqn}
	for i := range namespaces { // the same ones whenever it starts
		m.target = append(m.target, "--namespace", fmt.Sprintf("ram=1MiB,uuid=00000000-0000-4000-8000-%012d", i+1))
	}
	m.un(m.target...)
	m.un(m.connect()...)
	s, err := control.NewClient(filepath.Join(m.dir, "ctrl0", "control.sock")).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.device = s.Devices[0].Device
	u, err := url.Parse(m.device)
	if err != nil {
		t.Fatal(err)
	}
	if m.client, err = dialNBD("unix", u.Query().Get("socket"), "1"); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *measured) end() {
	m.client.conn.Close()
	execProgram(m.T, "--run-dir", m.dir, "disconnect", "-n", m.nqn, "--force")
	execProgram(m.T, "--run-dir", m.dir, "target", "stop")
}

func (m *measured) connect(more ...string) []string {
	return append([]string{"connect", "-a", loopback(), "-s", "4423", "-n", m.nqn, "--provider", "roce", "--frontend", "nbd-socket",
		"-Q", "16", "--max-io-size", "64KiB", "-c", "1", "--metrics-listen", m.address}, more...)
}

// TestMetrics looks at a server in all ways in which its metrics can be looked at, while
// requests are made, during an outage that the target makes, and after its death.
func TestMetrics(t *testing.T) {
	m := newMeasured(t)
	defer m.end()
	for _, look := range []struct {
		name string
		run  func(*measured)
	}{
		{"requests", (*measured).requests}, {"top", (*measured).top}, {"outage", (*measured).outage},
		{"address in use", (*measured).addressInUse}, {"death", (*measured).death},
	} {
		t.Run(look.name, func(t *testing.T) {
			of := *m
			of.T = t
			look.run(&of)
		})
	}
}

func (m *measured) requests() {
	const writes, reads = 200, 100
	data := make([]byte, 4096)
	for i := range writes {
		if err := m.client.do(nbdWrite, uint64(i%64)*4096, data, 10*time.Second); err != nil {
			m.Fatal(err)
		}
	}
	for range reads {
		if err := m.client.do(nbdRead, 0, data, 10*time.Second); err != nil {
			m.Fatal(err)
		}
	}
	if err := m.client.do(nbdFlush, 0, nil, 10*time.Second); err != nil {
		m.Fatal(err)
	}
	m.await("the last request", func(text string) bool {
		n, _ := sum(text, "ublk_nvmeof_requests_total", `operation="flush"`)
		return n == 1
	})
	tcp, _ := scrape(m.T, "tcp", m.address, "/metrics")
	unix, _ := scrape(m.T, "unix", filepath.Join(m.dir, "ctrl0", "control.sock"), "/metrics")
	device := fmt.Sprintf("device=%q", m.device)
	for way, text := range map[string]string{"--metrics-listen": tcp, "control socket": unix, "metrics": m.un("metrics")} {
		for _, c := range []struct {
			name string
			with []string
			want float64
		}{
			{"ublk_nvmeof_up", []string{`server="ctrl0"`}, 1},
			{"ublk_nvmeof_controller_state", []string{`state="live"`}, 1},
			{"ublk_nvmeof_requests_total", []string{device, `operation="write"`}, writes},
			{"ublk_nvmeof_requests_total", []string{device, `operation="read"`}, reads},
			{"ublk_nvmeof_requests_total", nil, writes + reads + 1},
			{"ublk_nvmeof_request_bytes_total", []string{device, `operation="write"`}, writes * 4096},
			{"ublk_nvmeof_request_errors_total", nil, 0},
			{"ublk_nvmeof_requests_in_flight", nil, 0},
			{"ublk_nvmeof_device_present", nil, 32},
			{"ublk_nvmeof_unavailable_seconds_total", nil, 0},
		} {
			if got, found := sum(text, c.name, c.with...); !found || got != c.want {
				m.Errorf("%s: %s%v is %v, want %v", way, c.name, c.with, got, c.want)
			}
		}
		// The first request of each loop is timed.
		if n, _ := sum(text, "ublk_nvmeof_request_duration_seconds_count", device); n < 1 || n > writes+reads {
			m.Errorf("%s: %v requests were timed", way, n)
		}
		for _, mode := range []string{"busy", "sleep"} {
			if s, _ := sum(text, "ublk_nvmeof_loop_seconds_total", `mode="`+mode+`"`); s <= 0 {
				m.Errorf("%s: loops were never %s", way, mode)
			}
		}
		if n, _ := sum(text, "ublk_nvmeof_roce_packets_total", `direction="sent"`); n < writes+reads {
			m.Errorf("%s: %v packets were sent", way, n)
		}
	}
	if _, code := scrape(m.T, "tcp", m.address, "/v1/status"); code != http.StatusNotFound {
		m.Errorf("--metrics-listen answers other requests: %d", code)
	}
}

// TestScrapeTime: a scrape of 32 devices takes at most 50 ms. The best of several counts,
// because other work on the machine is not the scrape's. With the race detector, which
// makes everything many times slower, there is no limit.
func TestScrapeTime(t *testing.T) {
	m := newMeasured(t)
	defer m.end()
	best, size := time.Hour, 0
	for range 20 {
		began := time.Now()
		text, _ := scrape(t, "tcp", m.address, "/metrics")
		best, size = min(best, time.Since(began)), len(text)
	}
	t.Logf("a scrape of 32 devices takes %v and has %d bytes", best, size)
	if best > 50*time.Millisecond && !withRaceDetector() {
		t.Errorf("a scrape of 32 devices takes %v", best)
	}
}

func withRaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func (m *measured) top() {
	ended := make(chan error, 1)
	stop := make(chan struct{})
	go func() { // load while it looks
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			if err := m.client.do(nbdRead, 0, make([]byte, 4096), 10*time.Second); err != nil {
				ended <- err
				return
			}
		}
	}()
	text := m.un("top", "--interval", "300ms", "--count", "2")
	out := m.un("top", "-o", "json", "--interval", "300ms")
	close(stop)
	if err := testenv.Receive(m.T, ended, "the end of the load"); err != nil {
		m.Fatal(err)
	}
	if strings.Count(text, "SERVER ") != 2 || strings.Contains(text, "\x1b") || !strings.Contains(text, m.device) || !strings.Contains(text, "ctrl0/0 ") {
		m.Errorf("top:\n%s", text)
	}
	var s struct {
		SchemaVersion int `json:"schema_version"`
		Servers       []struct {
			Server  string
			Devices []struct {
				Device string
				Read   struct{ Rate float64 }
				Write  struct{ Rate float64 }
			}
			Loops []struct{ Busy, Spin, Sleep float64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || s.SchemaVersion != 1 || len(s.Servers) != 1 || len(s.Servers[0].Devices) != 32 {
		m.Fatalf("%v, %s", err, out)
	}
	d := s.Servers[0].Devices[0]
	if d.Device != m.device || d.Read.Rate <= 0 || d.Write.Rate != 0 || s.Servers[0].Devices[1].Read.Rate != 0 {
		m.Errorf("%+v", s.Servers[0].Devices[:2])
	}
	for _, l := range s.Servers[0].Loops {
		if all := l.Busy + l.Spin + l.Sleep; all < 0.5 || all > 1.5 {
			m.Errorf("a loop has spent its time on %+v", l)
		}
	}
}

// outage: the target rejects connections for a while. The time is in unavailable_seconds,
// while it lasts and afterwards, and the request that waits is held.
func (m *measured) outage() {
	value := func(text, name string, with ...string) float64 {
		v, _ := sum(text, name, with...)
		return v
	}
	m.un("target", "reject", "6")
	began := time.Now()
	m.un("target", "drop")
	m.await("the outage", func(text string) bool { return value(text, "ublk_nvmeof_controller_state", `state="connecting"`) == 1 })
	read := make(chan error, 1)
	go func() { read <- m.client.do(nbdRead, 0, make([]byte, 4096), time.Minute) }()
	text := m.await("a second of the outage", func(text string) bool {
		return value(text, "ublk_nvmeof_unavailable_seconds_total") > 1 && value(text, "ublk_nvmeof_requests_held") == 1
	})
	if n := value(text, "ublk_nvmeof_association_losses_total"); n != 1 {
		m.Errorf("%v losses", n)
	}
	m.un("target", "reject", "off")
	text = m.await("the end of the outage", func(text string) bool { return value(text, "ublk_nvmeof_controller_state", `state="live"`) == 1 })
	lasted := time.Since(began).Seconds()
	unavailable := value(text, "ublk_nvmeof_unavailable_seconds_total")
	if unavailable < 1 || unavailable > lasted {
		m.Errorf("%v s were unavailable in an outage of at most %v s", unavailable, lasted)
	}
	if err := testenv.Receive(m.T, read, "the answer to the read"); err != nil {
		m.Errorf("the request that was held: %v", err)
	}
	text, _ = scrape(m.T, "tcp", m.address, "/metrics")
	if again := value(text, "ublk_nvmeof_unavailable_seconds_total"); again != unavailable {
		m.Errorf("%v s after the outage, then %v s", unavailable, again)
	}
	if value(text, "ublk_nvmeof_reconnects_total") != 1 || value(text, "ublk_nvmeof_reconnect_attempts_total") < 2 || value(text, "ublk_nvmeof_requests_held") != 0 {
		m.Errorf("after the outage:\n%s", text)
	}
}

// addressInUse: a server whose address of --metrics-listen is taken does not start, and
// says so.
func (m *measured) addressInUse() {
	_, errs, code := execProgram(m.T, append([]string{"--run-dir", m.dir}, m.connect("--duplicate-connect")...)...)
	if code == exit.OK || !strings.Contains(errs, "--metrics-listen") || !strings.Contains(errs, m.address) || strings.Count(errs, "\n") != 1 {
		m.Errorf("exit code %d, %s", code, errs)
	}
	if left, _ := filepath.Glob(filepath.Join(m.dir, "ctrl1")); len(left) > 0 {
		m.Errorf("left behind: %v", left)
	}
}

// death: the metrics of the run directory have a server that died.
func (m *measured) death() {
	s, err := control.NewClient(filepath.Join(m.dir, "ctrl0", "control.sock")).Status(m.Context())
	if err != nil {
		m.Fatal(err)
	}
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		m.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		text := m.un("metrics")
		if up, found := sum(text, "ublk_nvmeof_up", `server="ctrl0"`); found && up == 0 {
			break
		}
		if time.Now().After(deadline) {
			m.Fatalf("the server is not down:\n%s", text)
		}
	}
	// The next server listens there again.
	m.un("recover", m.nqn)
	m.await("the next server", func(text string) bool { up, _ := sum(text, "ublk_nvmeof_up"); return up == 1 })
}

// TestIsTerminal: only a terminal's screen is cleared.
func TestIsTerminal(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if isTerminal(file) || isTerminal(io.Discard) {
		t.Error("a file is a terminal")
	}
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	if !isTerminal(pty) {
		t.Error("a terminal is none")
	}
	looks := 0
	look := func() (output.Sample, error) {
		looks++
		return output.Sample{Time: time.Unix(int64(looks), 0)}, nil
	}
	if err := watch(t.Context(), file, look, time.Millisecond, 3, output.Normal); err != nil || looks != 4 {
		t.Errorf("%d looks for 3 samples, %v", looks, err)
	}
	text, err := os.ReadFile(file.Name())
	if err != nil || strings.Count(string(text), "SERVER") != 3 || strings.Contains(string(text), clearScreen) {
		t.Errorf("%q, %v", text, err)
	}
}
