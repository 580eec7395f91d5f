package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// scalePlan is what the guest measures: each number of devices with each number of queues.
type scalePlan struct {
	Devices, Queues []int
	Runtime, Idle   time.Duration
}

// scalePoint is what a server with some devices and queues does and uses.
type scalePoint struct {
	Devices int     `json:"devices"`
	Queues  int     `json:"queues"` // of each device
	IOPS    float64 `json:"iops"`   // 4 KiB random reads of all devices together
	// ServerPerIO is the server's CPU time for an I/O in nanoseconds.
	ServerPerIO float64 `json:"server_ns_per_io"`
	RSS         uint64  `json:"rss_bytes"` // after the load
	Pinned      uint64  `json:"pinned_bytes"`
	Threads     int     `json:"threads"`
	Sleeps      float64 `json:"idle_sleeps_per_s"` // of all threads, device up and unused
	IdlePercent float64 `json:"idle_percent"`      // of one CPU
}

// scaleDepth is the number of requests in flight, of all devices together.
const scaleDepth = 64

// scaleMain measures in a VM of mode icount how one server scales with devices and queues.
func scaleMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench scale", flag.ContinueOnError)
	kernel := fs.String("kernel", "7.3", "kernel `series` to boot")
	devices := fs.String("devices", "1,4,16,64", "`numbers` of devices, comma-separated")
	queues := fs.String("queues", "1,2,4", "`numbers` of queues, comma-separated")
	cpus := fs.Int("cpus", 4, "virtual CPUs")
	timeout := fs.Duration("timeout", time.Hour, "longest `time` for the VM")
	p := scalePlan{}
	fs.DurationVar(&p.Runtime, "runtime", time.Second, "measured `time` of one fio run, on the guest's clock")
	fs.DurationVar(&p.Idle, "idle", 5*time.Second, "`time` over which the idle server is watched")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var err error
	if p.Devices, err = numbers(*devices); err != nil {
		return err
	}
	if p.Queues, err = numbers(*queues); err != nil {
		return err
	}
	o := options{kernel: *kernel, mtu: 4200, memory: "4G", timeout: *timeout, command: strings.Join(append([]string{"scale"}, args...), " ")}
	o.plan.CPUs = *cpus
	root, err := repository()
	if err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := build(ctx, []string{pathOurs}); err != nil {
		return err
	}
	points, err := o.scale(ctx, root, p)
	if len(points) == 0 {
		return err
	}
	env := o.environment(modeICount)
	name := filepath.Join("bench", "results", env.Date.Format("2006-01-02")+"-"+o.kernel+"-icount-scale")
	text := scaleMarkdown(env, points)
	fmt.Print(text)
	data, jerr := json.MarshalIndent(points, "", "\t")
	return errors.Join(err, jerr,
		os.WriteFile(name+".md", []byte(text), 0o644),
		os.WriteFile(name+".json", append(data, '\n'), 0o644),
		os.WriteFile(filepath.Join("docs", "scale.svg"), []byte(scaleSVG(points)), 0o644))
}

func numbers(list string) ([]int, error) {
	var all []int
	for _, s := range strings.Split(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q: want numbers above 0", list)
		}
		all = append(all, n)
	}
	return all, nil
}

// scale runs the plan in a VM.
func (o options) scale(ctx context.Context, root string, p scalePlan) ([]scalePoint, error) {
	plan, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "build/vm", "--kernel", o.kernel, "--cpus", strconv.Itoa(o.plan.CPUs), "--mem", o.memory,
		"--mtu", strconv.Itoa(o.mtu), "--timeout", o.timeout.String(), "--icount", "--", self, "scale-guest", string(plan), root)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(&out, os.Stderr)
	err = cmd.Run()
	var points []scalePoint
	for line := range bytes.Lines(out.Bytes()) {
		var point scalePoint
		if json.Unmarshal(line, &point) == nil {
			points = append(points, point)
		}
	}
	return points, err
}

// scaleGuest is the program in the VM; its arguments are the plan and the root of the repository.
func scaleGuest(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: scale-guest PLAN ROOT")
	}
	var p scalePlan
	if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
		return fmt.Errorf("parse plan: %w", err)
	}
	g := guest{out: json.NewEncoder(os.Stdout)}
	g.plan.Lab, g.plan.Ours = filepath.Join(args[1], "e2e", "lab.sh"), filepath.Join(args[1], "build", "ublk-nvmeof")
	g.plan.SizeMiB, g.plan.Runtime, g.plan.Idle = 8, p.Runtime, p.Idle
	g.clock.use = true
	g.clock.hold()
	defer g.clock.release()
	if _, err := command(ctx, "modprobe", "ublk_drv", "ublks_max=128"); err != nil {
		return err
	}
	for i, devices := range p.Devices {
		nqn, service := fmt.Sprintf("%s-%d", targetNQN, devices), strconv.Itoa(4430+i)
		if err := g.target(ctx, nqn, "ns="+strconv.Itoa(devices), "svc="+service); err != nil {
			return err
		}
		for _, queues := range p.Queues {
			point, err := g.scalePoint(ctx, nqn, service, queues)
			if err != nil {
				return fmt.Errorf("%d devices, %d queues: %w", devices, queues, err)
			}
			if err := g.out.Encode(point); err != nil {
				return err
			}
		}
	}
	return nil
}

// scalePoint connects all namespaces of a subsystem, puts a load on all of them, and watches the
// idle server.
func (g *guest) scalePoint(ctx context.Context, nqn, service string, queues int) (scalePoint, error) {
	out, err := command(ctx, g.plan.Ours, "connect", "-t", "rdma", "-a", targetAddress, "-s", service, "-n", nqn,
		"-i", strconv.Itoa(queues), "--queue-size=32", "--max-io-size=64KiB")
	if err != nil {
		return scalePoint{}, err
	}
	d, err := ublkDisk(ctx, out)
	if err != nil {
		return scalePoint{}, err
	}
	var nodes []string
	for _, m := range ublkNode.FindAll(out, -1) {
		nodes = append(nodes, string(m))
	}
	point := scalePoint{Devices: len(nodes), Queues: queues}
	err = errors.Join(g.scaleLoad(ctx, d.server, nodes, &point), g.scaleIdle(ctx, d.server, &point))
	if _, derr := command(ctx, g.plan.Ours, "disconnect", "-n", nqn); derr != nil {
		return point, errors.Join(err, derr)
	}
	return point, errors.Join(err, gone(ctx, d.server))
}

func (g *guest) scaleLoad(ctx context.Context, server int, nodes []string, point *scalePoint) error {
	args := []string{"--rw=randread", "--bs=4k", "--ioengine=io_uring", "--direct=1", "--thread", "--time_based",
		"--iodepth=" + strconv.Itoa(max(1, scaleDepth/len(nodes))), "--ramp_time=" + milliseconds(g.plan.Runtime/2),
		"--runtime=" + milliseconds(g.plan.Runtime), "--group_reporting", "--output-format=json"}
	for _, node := range nodes {
		args = append(args, "--name="+filepath.Base(node), "--filename="+node)
	}
	from, err := readTaskUse(server)
	if err != nil {
		return err
	}
	var before, after uint64
	sum := func(total *uint64) error {
		for _, node := range nodes {
			n, err := transferred(node)
			if err != nil {
				return err
			}
			*total += n
		}
		return nil
	}
	if err := sum(&before); err != nil {
		return err
	}
	report, err := command(ctx, "fio", args...)
	if err != nil {
		return err
	}
	to, err := readTaskUse(server)
	if err != nil {
		return err
	}
	if err := sum(&after); err != nil {
		return err
	}
	r, err := parseFio(report)
	if err != nil {
		return err
	}
	point.IOPS = r.iops
	point.ServerPerIO = perIO(float64(to.run-from.run), (after-before)>>12)
	point.Threads = len(to.threads)
	if point.RSS, err = residentMemory(server); err != nil {
		return err
	}
	pinned, err := readStatus(fmt.Sprintf("/proc/%d/status", server), "VmPin")
	point.Pinned = pinned << 10
	return err
}

// scaleIdle watches the server without a load.
func (g *guest) scaleIdle(ctx context.Context, server int, point *scalePoint) error {
	g.clock.release()
	defer g.clock.hold()
	if err := sleep(ctx, time.Second); err != nil { // what belongs to the load is not idling
		return err
	}
	from, err := readTaskUse(server)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := sleep(ctx, g.plan.Idle); err != nil {
		return err
	}
	to, err := readTaskUse(server)
	if err != nil {
		return err
	}
	elapsed := time.Since(start).Seconds()
	point.Sleeps = float64(to.sleeps-from.sleeps) / elapsed
	point.IdlePercent = 100 * (to.run - from.run).Seconds() / elapsed
	return nil
}

func scaleMarkdown(e environment, points []scalePoint) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Devices and queues of one server, kernel %s, icount\n\n", e.Series)
	fmt.Fprintf(&b, "%s, commit %s, %s, %s. Flags: `%s`.\n", e.Date.Format("2006-01-02 15:04 MST"), e.Commit, e.Go, e.QEMU, e.Command)
	fmt.Fprintf(&b, "%d CPUs on one clock. 4 KiB random reads, %d in flight over all devices, queues of 32 entries, requests up to 64 KiB.\n\n", e.Plan.CPUs, scaleDepth)
	b.WriteString("| devices | queues of each | IOPS together | server's CPU, µs per I/O | resident | registered | threads | idle: wake-ups per s | idle: % of a CPU |\n")
	b.WriteString("|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, p := range points {
		fmt.Fprintf(&b, "| %d | %d | %s | %.1f | %s | %s | %d | %.1f | %.3f |\n", p.Devices, p.Queues, humanize.CommafWithDigits(p.IOPS, 0),
			p.ServerPerIO/1000, humanize.IBytes(p.RSS), humanize.IBytes(p.Pinned), p.Threads, p.Sleeps, p.IdlePercent)
	}
	return b.String()
}
