package metrics

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v2"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/internal/testenv"
)

// root is the root of the repository.
const root = "../../../.."

var (
	metricName = regexp.MustCompile(prefix + `[a-z_]+`)
	selector   = regexp.MustCompile(`(` + prefix + `[a-z_]+)\{([^}]*)\}`)
	matcher    = regexp.MustCompile(`([a-z_]+)(=~|!=|=|!~)"([^"]*)"`)
)

// series has the labels of each metric, with the values that the example has, as
// Prometheus names the series.
func series(t *testing.T) map[string]map[string][]string {
	t.Helper()
	r := prometheus.NewRegistry()
	s := server("ctrl0", 1)
	r.MustRegister(serve(s))
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string][]string{}
	for _, f := range families {
		labels := map[string][]string{}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = append(labels[l.GetName()], l.GetValue())
			}
		}
		names := []string{f.GetName()}
		if f.GetType().String() == "HISTOGRAM" {
			names = []string{f.GetName() + "_bucket", f.GetName() + "_sum", f.GetName() + "_count"}
		}
		for _, n := range names {
			out[n] = labels
		}
	}
	return out
}

// checkExpression complains of metrics, labels and values of labels that do not exist.
func checkExpression(known map[string]map[string][]string, expr string) error {
	names := metricName.FindAllString(expr, -1)
	if len(names) == 0 {
		return fmt.Errorf("%q has no metric of this program", expr)
	}
	for _, n := range names {
		if known[n] == nil {
			return fmt.Errorf("%q: there is no metric %s", expr, n)
		}
	}
	for _, s := range selector.FindAllStringSubmatch(expr, -1) {
		for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
			values := known[s[1]][m[1]]
			if values == nil {
				return fmt.Errorf("%q: %s has no label %s", expr, s[1], m[1])
			}
			if strings.HasPrefix(m[3], "$") { // a variable of a dashboard
				continue
			}
			for v := range strings.SplitSeq(m[3], "|") {
				if !slices.Contains(values, v) {
					return fmt.Errorf("%q: label %s of %s is never %q", expr, m[1], s[1], v)
				}
			}
		}
	}
	return nil
}

func TestCheckExpression(t *testing.T) {
	known := series(t)
	for expr, want := range map[string]string{
		`ublk_nvmeof_up == 0`: "",
		`rate(ublk_nvmeof_request_duration_seconds_bucket{operation=~"read|write",device=~"$device"}[5m])`: "",
		`up == 0`:                                         "has no metric",
		`ublk_nvmeof_down == 1`:                           "there is no metric ublk_nvmeof_down",
		`ublk_nvmeof_request_duration_seconds{}`:          "there is no metric",
		`ublk_nvmeof_up{device="ublkb0"}`:                 "ublk_nvmeof_up has no label device",
		`ublk_nvmeof_controller_state{state="connected"}`: `label state of ublk_nvmeof_controller_state is never "connected"`,
	} {
		err := checkExpression(known, expr)
		if got := fmt.Sprint(err); (err == nil) != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %v, want %q", expr, err, want)
		}
	}
}

// TestRules: the alert rules parse, are complete, and are about metrics that exist.
func TestRules(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "contrib/prometheus/ublk-nvmeof.rules.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		t.Fatal(err)
	}
	known, seen := series(t), map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if err := checkExpression(known, r.Expr); err != nil {
				t.Errorf("%s: %v", r.Alert, err)
			}
			if r.Alert == "" || seen[r.Alert] || !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) ||
				r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("incomplete or double: %+v", r)
			}
			seen[r.Alert] = true
		}
	}
	if len(seen) < 10 {
		t.Errorf("%d rules", len(seen))
	}
}

// TestDashboard: the dashboard parses, and shows metrics that exist. No two panels have
// the same number or lie over each other.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "contrib/grafana/ublk-nvmeof.json"))
	if err != nil {
		t.Fatal(err)
	}
	type position struct{ X, Y, W, H int }
	var d struct {
		Title      string
		UID        string
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos position
			Targets []struct{ Expr, LegendFormat, RefID string }
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	known, ids, shown := series(t), map[int]bool{}, map[position]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("%s: another panel has number %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := position{X: p.GridPos.X + x, Y: p.GridPos.Y + y}
				if shown[at] || at.X >= 24 {
					t.Fatalf("%s: lies over another panel, or beyond the edge, at %d, %d", p.Title, at.X, at.Y)
				}
				shown[at] = true
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			if err := checkExpression(known, q.Expr); err != nil {
				t.Errorf("%s: %v", p.Title, err)
			}
		}
	}
	for _, v := range d.Templating.List[1:] {
		if err := checkExpression(known, v.Definition); err != nil {
			t.Errorf("variable %s: %v", v.Name, err)
		}
	}
	if d.Title == "" || d.UID == "" || len(d.Panels) < 10 {
		t.Errorf("%+v", d)
	}
}

// promtool is Prometheus' own checker. e2e/setup puts it into build/cache.
func promtool(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(root, "build/cache/promtool"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = os.Stat(path); err != nil {
		path, err = exec.LookPath("promtool")
		if err != nil {
			err = errors.New("there is no promtool in PATH and none in build/cache; e2e/setup gets it")
		}
	}
	testenv.Need(t, "promtool", err)
	return path
}

// TestPromtool has Prometheus check rules and metrics, and try the rules.
func TestPromtool(t *testing.T) {
	tool := promtool(t)
	run := func(stdin string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), tool, args...)
		cmd.Dir = filepath.Join(root, "contrib/prometheus")
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("", "check", "rules", "ublk-nvmeof.rules.yml")
	run("", "test", "rules", "ublk-nvmeof.test.yml")
	var b strings.Builder
	if err := Write(&b, []control.Status{server("ctrl0", 2)}); err != nil {
		t.Fatal(err)
	}
	run(b.String(), "check", "metrics")
}
