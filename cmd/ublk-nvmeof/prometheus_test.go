package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/internal/testenv"
)

// prometheus is a Prometheus that scrapes a server four times a second, with the rules of
// contrib. Only the times that they wait are shorter.
type prometheus struct {
	*testing.T
	address string
	rules   int
}

// findPrometheus returns the program. e2e/setup puts it into build/cache.
func findPrometheus(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../../build/cache/prometheus")
	if err == nil {
		if _, err = os.Stat(path); err != nil {
			path, err = exec.LookPath("prometheus")
		}
	}
	if err != nil {
		err = errors.New("there is no prometheus in PATH and none in build/cache; e2e/setup gets it")
	}
	testenv.Need(t, "prometheus", err)
	if err := exec.Command("fio", "--enghelp=nbd").Run(); err != nil {
		testenv.Need(t, "nbd-clients", fmt.Errorf("fio with the engine nbd: %w", err))
	}
	return path
}

func startPrometheus(t *testing.T, scraped string) *prometheus {
	t.Helper()
	program, dir := findPrometheus(t), t.TempDir()
	text, err := os.ReadFile("../../contrib/prometheus/ublk-nvmeof.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	p := &prometheus{T: t, address: net.JoinHostPort(loopback(), freePort(t, loopback())), rules: strings.Count(string(text), "- alert: ")}
	config := fmt.Sprintf(`global: {scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}
rule_files: [rules.yml]
scrape_configs: [{job_name: ublk-nvmeof, static_configs: [{targets: [%q]}]}]
`, scraped)
	rules := regexp.MustCompile(`(?m)^( +for:) .*$`).ReplaceAll(text, []byte("$1 1s"))
	err = errors.Join(os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o644), os.WriteFile(filepath.Join(dir, "rules.yml"), rules, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+p.address, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if said, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("Prometheus: %s", said)
		}
	})
	return p
}

// get reads data of the API into out. The error is that of a connection, or what Prometheus
// says.
func (p *prometheus) get(path string, query url.Values, out any) error {
	resp, err := http.Get("http://" + p.address + "/api/v1/" + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Data          any
	}{Data: out}
	if err := json.Unmarshal(text, &answer); err != nil {
		return fmt.Errorf("%s: %w: %.200s", path, err, text)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return nil
}

// query evaluates an expression. found is false if it has no value.
func (p *prometheus) query(expr string) (value float64, found bool, err error) {
	var data struct {
		Result []struct{ Value [2]any }
	}
	if err := p.get("query", url.Values{"query": {expr}}, &data); err != nil || len(data.Result) == 0 {
		return 0, false, err
	}
	text, _ := data.Result[0].Value[1].(string)
	value, err = strconv.ParseFloat(text, 64)
	return value, err == nil, err
}

// await waits until an expression has a value, which one that compares has when it is true. A
// scrape that took too long leaves all of a server's series without one for a moment.
func (p *prometheus) await(expr string) float64 {
	p.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		v, found, err := p.query(expr)
		if found {
			return v
		}
		if time.Now().After(deadline) {
			p.Fatalf("%s has no value: %v", expr, err)
		}
	}
}

// fioJob is what fio says that it has done.
type fioJob struct {
	Read, Write struct {
		Requests float64 `json:"total_ios"`
		Bytes    float64 `json:"io_bytes"`
		Latency  struct {
			Mean float64 // nanoseconds
		} `json:"clat_ns"`
	}
}

func (m *measured) fio(args ...string) fioJob {
	m.Helper()
	file := filepath.Join(m.TempDir(), "fio.json")
	said, err := exec.CommandContext(m.Context(), "fio", append([]string{"--name=x", "--ioengine=nbd", "--uri=" + m.device, "--output-format=json", "--output=" + file}, args...)...).CombinedOutput()
	if err != nil {
		m.Fatalf("fio: %v: %s", err, said)
	}
	out, err := os.ReadFile(file)
	if err != nil {
		m.Fatal(err)
	}
	var result struct{ Jobs []fioJob }
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		m.Fatalf("%v: %s", err, out)
	}
	return result.Jobs[0]
}

// TestPrometheus has a real Prometheus scrape a server: its counters are those of fio, an
// outage makes it raise the alert, and it can evaluate all of the dashboard.
func TestPrometheus(t *testing.T) {
	findPrometheus(t)
	m := newMeasured(t)
	defer m.end()
	p := startPrometheus(t, m.address)
	p.await(`up{job="ublk-nvmeof"} == 1`)
	p.await(`ublk_nvmeof_controller_state{state="live"} == 1`)
	for _, look := range []struct {
		name string
		run  func(*prometheus, *measured)
	}{{"fio", countsOfFio}, {"dashboard", evaluateDashboard}, {"outage", raiseAlert}} {
		t.Run(look.name, func(t *testing.T) {
			server, scraper := *m, *p
			server.T, scraper.T = t, t
			look.run(&scraper, &server)
		})
	}
}

// countsOfFio compares Prometheus' figures with fio's. The counters of requests and bytes
// are equal. The histograms have the requests that were timed. The distance between two of
// these is 1 to 127, each as likely, so of n requests n/64 are timed, with a standard
// deviation of the square root of n × 1344/64³ (renewal theorem; 1344 is the variance of the
// distance).
func countsOfFio(p *prometheus, m *measured) {
	device := fmt.Sprintf("device=%q", m.device)
	job := m.fio("--rw=randrw", "--bs=4k", "--size=1m", "--iodepth=16", "--io_size=160m")
	all := job.Read.Requests + job.Write.Requests
	p.await(fmt.Sprintf("sum(ublk_nvmeof_requests_total{%s}) >= %v", device, all))
	for operation, did := range map[string]struct{ requests, bytes float64 }{
		"read": {job.Read.Requests, job.Read.Bytes}, "write": {job.Write.Requests, job.Write.Bytes},
	} {
		of := fmt.Sprintf("{%s,operation=%q}", device, operation)
		if n, bytes := p.await("ublk_nvmeof_requests_total"+of), p.await("ublk_nvmeof_request_bytes_total"+of); n != did.requests || bytes != did.bytes {
			p.Errorf("%s: %v requests of %v bytes, fio has done %v of %v", operation, n, bytes, did.requests, did.bytes)
		}
		if last, count := p.await("ublk_nvmeof_request_duration_seconds_bucket"+strings.Replace(of, "}", `,le="+Inf"}`, 1)), p.await("ublk_nvmeof_request_duration_seconds_count"+of); last != count {
			p.Errorf("%s: %v durations in the buckets, %v in all", operation, last, count)
		}
	}
	timed := p.await(fmt.Sprintf("sum(ublk_nvmeof_request_duration_seconds_count{%s})", device))
	mean := all / initiator.SampleInterval
	const loops, seconds = 16, 30 // the first request of each loop is timed, and one each second of few requests
	if tolerance := 6*math.Sqrt(all*1344/(64*64*64)) + loops + seconds; math.Abs(timed-mean) > tolerance {
		p.Errorf("%v of %v requests were timed, want %v ± %v", timed, all, mean, tolerance)
	}
	// Nothing else uses the server, so the stages are those of the device.
	whole := p.await("sum(ublk_nvmeof_request_duration_seconds_sum)")
	if stages := p.await("sum(ublk_nvmeof_request_stage_duration_seconds_sum)"); math.Abs(stages-whole) > whole/1e6 {
		p.Errorf("the stages take %v s, the requests %v s", stages, whole)
	}
	// fio's requests include those of the server, so they take longer, on average over all.
	took := (job.Read.Requests*job.Read.Latency.Mean + job.Write.Requests*job.Write.Latency.Mean) / all / 1e9
	if got := whole / timed; got <= 0 || got > 2*took {
		p.Errorf("requests took %v s on average, those of fio %v s", got, took)
	}
	p.Logf("%v requests as by fio; %v were timed, want about %.0f; mean %.1f µs, by fio %.1f µs", all, timed, mean, 1e6*whole/timed, 1e6*took)
}

// evaluateDashboard has Prometheus evaluate the expressions of the dashboard.
func evaluateDashboard(p *prometheus, m *measured) {
	text, err := os.ReadFile("../../contrib/grafana/ublk-nvmeof.json")
	if err != nil {
		p.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		p.Fatal(err)
	}
	m.fio("--rw=randrw", "--bs=4k", "--size=1m", "--time_based", "--runtime=2")
	variables := strings.NewReplacer("$server", ".*", "$nqn", ".*", "$device", ".*", "$__rate_interval", "1m", "$__range", "1m")
	expressions, empty := 0, 0
	for _, panel := range dashboard.Panels {
		for _, q := range panel.Targets {
			expr := variables.Replace(q.Expr)
			expressions++
			if !strings.HasSuffix(expr, "> 0") {
				p.await(expr)
				continue
			}
			_, found, err := p.query(expr) // of what never happens here
			if err != nil {
				p.Errorf("%s: %s: %v", panel.Title, expr, err)
			}
			if !found {
				empty++
			}
		}
	}
	if expressions < 25 || empty > 5 {
		p.Errorf("%d of %d expressions have no value", empty, expressions)
	}
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	if err := p.get("rules", nil, &data); err != nil || len(data.Groups) != 1 || len(data.Groups[0].Rules) != p.rules {
		p.Fatalf("%v, %+v, want %d rules", err, data, p.rules)
	}
	for _, r := range data.Groups[0].Rules {
		if r.Health != "ok" {
			p.Errorf("rule %s: %s %s", r.Name, r.Health, r.LastError)
		}
	}
}

// raiseAlert takes the target away. The time is in unavailable_seconds, and the alert fires
// until the target is back.
func raiseAlert(p *prometheus, m *measured) {
	const alert = `ALERTS{alertname="UblkNvmeofUnavailable",alertstate="firing"}`
	if _, found, err := p.query(alert); found || err != nil {
		p.Fatalf("the alert fires without a reason: %v", err)
	}
	before := p.await("ublk_nvmeof_unavailable_seconds_total")
	began := time.Now()
	m.un("target", "stop")
	p.await(`ublk_nvmeof_controller_state{state="connecting"} == 1`)
	p.await(alert)
	during := p.await(fmt.Sprintf("ublk_nvmeof_unavailable_seconds_total > %v", before+1))
	p.await(fmt.Sprintf("ublk_nvmeof_unavailable_seconds_total > %v", during))
	m.un(m.target...)
	p.await(`ublk_nvmeof_controller_state{state="live"} == 1`)
	lasted := time.Since(began).Seconds()
	p.await("absent(" + alert + ")")
	if lost := p.await("ublk_nvmeof_unavailable_seconds_total") - before; lost < 1 || lost > lasted {
		p.Errorf("%v s were unavailable in an outage of at most %v s", lost, lasted)
	}
	if n := p.await("sum(ublk_nvmeof_association_losses_total)"); n != 1 {
		p.Errorf("%v losses", n)
	}
}
