package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/poller"
)

// nbdMain measures on this machine, without a VM, what a client of an NBD socket gets
// (fio's nbd engine, one connection), in interleaved rounds:
//
//	ours    NBD socket, initiator, RoCEv2 in Go over loopback, target in memory
//	front   our NBD server over memory in the same process: without the network
//	nbdkit  nbdkit memory
//	proxy   nbdkit nbd, which asks another nbdkit memory over TCP: two hops, as ours
//	qemu    qemu-nbd of a file in memory
func nbdMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench nbd", flag.ContinueOnError)
	rounds := fs.Int("rounds", 5, "interleaved rounds")
	span := fs.Duration("runtime", 2*time.Second, "measured `time` of one fio run")
	sizeMiB := fs.Int("size", 256, "size of the device in `MiB`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-nbd")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &nbdBench{dir: dir, sizeMiB: *sizeMiB, span: *span, uris: map[string]string{}}
	defer b.close()
	for _, start := range []func(context.Context) error{b.startOurs, b.startFront, b.startNbdkit, b.startProxy, b.startQEMU} {
		if err := start(ctx); err != nil {
			return err
		}
	}
	r := nbdResult{
		Date: time.Now().UTC(), Commit: commit(), Go: runtime.Version(), Host: hostCPU(), Kernel: firstLine("uname", "-r"),
		Fio: firstLine("fio", "--version"), Nbdkit: firstLine("nbdkit", "--version"), QEMU: firstLine("qemu-nbd", "--version"),
		Rounds: *rounds, Runtime: *span, SizeMiB: *sizeMiB,
	}
	for round := 1; round <= *rounds; round++ {
		for _, w := range nbdWorkloads {
			for i := range nbdPaths {
				path := nbdPaths[(i+round)%len(nbdPaths)]
				s, err := b.measure(ctx, w, path)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", path, w.name, err)
				}
				s.Round = round
				r.Samples = append(r.Samples, s)
				fmt.Fprintf(os.Stderr, "round %d %s %s: %.0f IOPS, load %s\n", round, w.name, path, s.IOPS, s.Load)
			}
		}
	}
	fmt.Print(r.markdown())
	root, err := repository()
	if err != nil {
		return err
	}
	return r.store(filepath.Join(root, "bench", "results"))
}

var nbdPaths = []string{"ours", "front", "nbdkit", "proxy", "qemu"}

var nbdWorkloads = []workload{
	{name: "4k-randread-qd1", rw: "randread", block: 4 << 10, depth: 1},
	{name: "4k-randread-qd32", rw: "randread", block: 4 << 10, depth: 32},
	{name: "4k-randwrite-qd32", rw: "randwrite", block: 4 << 10, depth: 32},
	{name: "128k-read-qd8", rw: "read", block: 128 << 10, depth: 8},
	{name: "128k-write-qd8", rw: "write", block: 128 << 10, depth: 8},
}

// nbdBench is what is being measured.
type nbdBench struct {
	dir     string
	sizeMiB int
	span    time.Duration
	uris    map[string]string
	closers []func()
}

func (b *nbdBench) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		b.closers[i]()
	}
}

func (b *nbdBench) socket(name string) string { return filepath.Join(b.dir, name+".sock") }

const nbdNQN = "nqn.2026-01.org.example:bench"

// startOurs starts a target and a server, both of the program built without cgo.
func (b *nbdBench) startOurs(ctx context.Context) error {
	program := filepath.Join(b.dir, "ublk-nvmeof")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "./cmd/ublk-nvmeof")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	run := func(ctx context.Context, args ...string) error {
		out, err := exec.CommandContext(ctx, program, append(args, "--run-dir", filepath.Join(b.dir, "run"))...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, out)
		}
		return nil
	}
	port := strconv.Itoa(20000 + os.Getpid()%10000)
	if err := run(ctx, "target", "--background", "-s", port, "-n", nbdNQN, "--namespace", fmt.Sprintf("ram=%dMiB", b.sizeMiB)); err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = run(context.Background(), "target", "stop") })
	if err := run(ctx, "connect", "-a", "127.0.0.1", "-s", port, "-n", nbdNQN, "-i", "2", "--provider", "roce", "--nbd-socket", b.socket("ours")); err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = run(context.Background(), "disconnect", "-n", nbdNQN, "--force") })
	b.uris["ours"] = "nbd+unix:///1?socket=" + b.socket("ours")
	return nil
}

// startFront serves memory from this process.
func (b *nbdBench) startFront(context.Context) error {
	var loops []*poller.Loop
	for range 2 {
		l, err := poller.New(poller.Config{})
		if err != nil {
			return err
		}
		loops = append(loops, l)
		b.closers = append(b.closers, func() { _ = l.Stop() })
	}
	dev, err := ram.New(ram.Config{Geometry: block.Geometry{Sectors: uint64(b.sizeMiB) << 20 >> block.SectorShift}})
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = dev.Close() })
	srv, err := nbd.New(nbd.Config{Exports: []nbd.Export{{Device: dev}}, Loops: loops})
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = srv.Stop(context.Background(), true) })
	l, err := net.Listen("unix", b.socket("front"))
	if err != nil {
		return err
	}
	go func() { _ = srv.Serve(l) }()
	b.uris["front"] = "nbd+unix:///?socket=" + b.socket("front")
	return nil
}

func (b *nbdBench) startNbdkit(ctx context.Context) error {
	return b.start(ctx, "nbdkit", "nbdkit", "--foreground", "--unix", b.socket("nbdkit"), "memory", fmt.Sprintf("%dM", b.sizeMiB))
}

func (b *nbdBench) startProxy(ctx context.Context) error {
	port := strconv.Itoa(30000 + os.Getpid()%10000)
	far := []string{"nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", port, "memory", fmt.Sprintf("%dM", b.sizeMiB)}
	if err := b.run(ctx, "tcp", "127.0.0.1:"+port, far...); err != nil {
		return err
	}
	return b.start(ctx, "proxy", "nbdkit", "--foreground", "--unix", b.socket("proxy"), "nbd", "hostname=127.0.0.1", "port="+port)
}

func (b *nbdBench) startQEMU(ctx context.Context) error {
	file, err := os.CreateTemp("/dev/shm", "bench-nbd")
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = os.Remove(file.Name()) })
	if err := errors.Join(file.Truncate(int64(b.sizeMiB)<<20), file.Close()); err != nil {
		return err
	}
	return b.start(ctx, "qemu", "qemu-nbd", "--persistent", "--shared=8", "--socket", b.socket("qemu"), "--format", "raw", file.Name())
}

// start starts somebody else's server on the socket of a path, and waits until it answers.
func (b *nbdBench) start(ctx context.Context, path string, args ...string) error {
	b.uris[path] = "nbd+unix:///?socket=" + b.socket(path)
	return b.run(ctx, "unix", b.socket(path), args...)
}

// run starts a program, and waits until it listens at an address.
func (b *nbdBench) run(ctx context.Context, network, address string, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	b.closers = append(b.closers, func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
	})
	for {
		if c, err := net.Dial(network, address); err == nil {
			return c.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// nbdSample is one run of fio.
type nbdSample struct {
	Round    int     `json:"round"`
	Workload string  `json:"workload"`
	Path     string  `json:"path"`
	IOPS     float64 `json:"iops"`
	P50      float64 `json:"p50_ns"`
	P99      float64 `json:"p99_ns"`
	Load     string  `json:"load"` // of the machine, over a minute
}

func (b *nbdBench) measure(ctx context.Context, w workload, path string) (nbdSample, error) {
	out, err := exec.CommandContext(ctx, "fio", "--name="+w.name, "--ioengine=nbd", "--uri="+b.uris[path], "--rw="+w.rw,
		"--bs="+strconv.Itoa(w.block), "--iodepth="+strconv.Itoa(w.depth), fmt.Sprintf("--size=%dm", b.sizeMiB),
		"--time_based", "--ramp_time=500ms", "--runtime="+milliseconds(b.span), "--output-format=json").Output()
	if err != nil {
		return nbdSample{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	f, err := parseFio(out)
	load, _ := os.ReadFile("/proc/loadavg") // only for the record
	first, _, _ := strings.Cut(string(load), " ")
	return nbdSample{Workload: w.name, Path: path, IOPS: f.iops, P50: f.p50, P99: f.p99, Load: first}, err
}

// nbdResult is all of a run.
type nbdResult struct {
	Date    time.Time     `json:"date"`
	Commit  string        `json:"commit"`
	Go      string        `json:"go"`
	Host    string        `json:"host"`
	Kernel  string        `json:"kernel"`
	Fio     string        `json:"fio"`
	Nbdkit  string        `json:"nbdkit"`
	QEMU    string        `json:"qemu"`
	Rounds  int           `json:"rounds"`
	Runtime time.Duration `json:"runtime_ns"`
	SizeMiB int           `json:"size_mib"`
	Samples []nbdSample   `json:"samples"`
}

func (r nbdResult) values(workload, path string) map[int]float64 {
	v := map[int]float64{}
	for _, s := range r.Samples {
		if s.Workload == workload && s.Path == path {
			v[s.Round] = s.IOPS
		}
	}
	return v
}

func (r nbdResult) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# NBD sockets\n\n%s, commit %s, %s, Linux %s, host %s, %s, %s, %s.\n", r.Date.Format("2006-01-02 15:04 UTC"), r.Commit, r.Go, r.Kernel, r.Host, r.Fio, r.Nbdkit, r.QEMU)
	fmt.Fprintf(&b, "fio's nbd engine, one connection on a unix socket, %d interleaved rounds of %v, %d MiB. Medians of IOPS [least..greatest]; the ratios are medians of those of neighbouring runs.\n\n", r.Rounds, r.Runtime, r.SizeMiB)
	cells := append([]string{"fio"}, nbdPaths...)
	row(&b, append(cells, "ours / proxy", "ours / nbdkit", "ours / qemu", "front / nbdkit"))
	rule(&b, len(cells)+4)
	for _, w := range nbdWorkloads {
		cells := []string{w.name}
		for _, p := range nbdPaths {
			var samples []float64
			for _, v := range r.values(w.name, p) {
				samples = append(samples, v)
			}
			cells = append(cells, format(spreadOf(samples), rate))
		}
		of := func(a, b string) string {
			return format(spreadOf(ratios(r.values(w.name, a), r.values(w.name, b))), ratio)
		}
		row(&b, append(cells, of("ours", "proxy"), of("ours", "nbdkit"), of("ours", "qemu"), of("front", "nbdkit")))
	}
	b.WriteString("\nours: NBD socket, initiator, RoCEv2 in Go over loopback, target in memory, in two processes. front: our NBD server over memory, in one. nbdkit: nbdkit memory. proxy: nbdkit nbd, over TCP to another nbdkit memory, in two processes. qemu: qemu-nbd of a file in memory.\n")
	var all []float64
	for _, s := range r.Samples {
		if v, err := strconv.ParseFloat(s.Load, 64); err == nil {
			all = append(all, v)
		}
	}
	fmt.Fprintf(&b, "Load of the machine meanwhile (of the last minute, this measurement included): %s.\n", format(spreadOf(all), ratio))
	return b.String()
}

func (r nbdResult) store(dir string) error {
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	name := filepath.Join(dir, r.Date.Format("2006-01-02")+"-nbd")
	return errors.Join(os.WriteFile(name+".json", append(data, '\n'), 0o644), os.WriteFile(name+".md", []byte(r.markdown()), 0o644))
}
