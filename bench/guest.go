package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// guest runs a plan inside the VM and reports by events, one JSON line each.
type guest struct {
	plan  plan
	out   *json.Encoder
	clock clockHolder
}

// guestMain is the program in the VM; its argument is the plan.
func guestMain(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: guest PLAN")
	}
	g := guest{out: json.NewEncoder(os.Stdout)}
	if err := json.Unmarshal([]byte(args[0]), &g.plan); err != nil {
		return fmt.Errorf("parse plan: %w", err)
	}
	g.clock.use = g.plan.HoldClock
	g.clock.hold()
	defer g.clock.release()
	if err := g.prepare(ctx); err != nil {
		return err
	}
	servers := make(map[string]*serverInfo)
	for round := 1; round <= g.plan.Rounds; round++ {
		if err := g.round(ctx, round, servers); err != nil {
			return err
		}
	}
	for _, name := range g.plan.Paths {
		if s := servers[name]; s != nil {
			if err := g.emit(event{Server: s}); err != nil {
				return err
			}
		}
	}
	if g.plan.Idle > 0 {
		if err := g.idle(ctx); err != nil {
			return err
		}
	}
	// Last, because switching trace points on may crash an emulated kernel.
	if g.plan.Syscalls {
		if err := g.syscalls(ctx); err != nil {
			return err
		}
	}
	return g.emit(event{Done: true})
}

func (g *guest) emit(e event) error { return g.out.Encode(e) }

// fail reports what could not be measured; the rest goes on. Only the end of
// the whole run is an error.
func (g *guest) fail(ctx context.Context, path, where string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return g.emit(event{Failure: &failure{Path: path, Where: where, Error: err.Error()}})
}

// prepare sets up the target and loads what the paths need.
func (g *guest) prepare(ctx context.Context) error {
	if err := g.target(ctx, targetNQN, "ns="+strconv.Itoa(max(1, g.plan.Devices))); err != nil {
		return err
	}
	for _, pair := range portPairs {
		if !slices.Contains(g.plan.Paths, pair.path) {
			continue
		}
		err := g.target(ctx, pair.nqn, "svc="+strings.Join(pair.services[:], ","), "qid_max="+strconv.Itoa(g.plan.Queues/pair.share))
		if err != nil {
			return err
		}
	}
	if slices.ContainsFunc(g.plan.Paths, func(name string) bool { return strings.HasSuffix(name, "-huge") }) {
		if err := reserveHugePages(); err != nil {
			return err
		}
	}
	for _, name := range g.plan.Paths {
		p, err := pathNamed(name)
		if err != nil {
			return err
		}
		if _, err := command(ctx, "modprobe", p.module); err != nil {
			return err
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	info := guestInfo{Kernel: unix.ByteSliceToString(uts.Release[:])}
	if out, err := command(ctx, "fio", "--version"); err == nil {
		info.Fio = strings.TrimSpace(string(out))
	}
	if out, err := command(ctx, "nvme", "version"); err == nil {
		first, _, _ := strings.Cut(string(out), "\n")
		info.Nvme = first
	}
	return g.emit(event{Guest: &info})
}

// target sets up a subsystem and fills its first namespace.
func (g *guest) target(ctx context.Context, nqn string, more ...string) error {
	args := append([]string{"target", "nqn=" + nqn, "size=" + strconv.Itoa(g.plan.SizeMiB)}, more...)
	if _, err := command(ctx, g.plan.Lab, args...); err != nil {
		return err
	}
	node, err := os.ReadFile("/sys/kernel/config/nvmet/subsystems/" + nqn + "/namespaces/1/device_path")
	if err != nil {
		return err
	}
	return fill(strings.TrimSpace(string(node)), g.plan.SizeMiB)
}

// fill writes the whole namespace, because null_blk keeps no page for what was
// not written and would read it without a copy.
func fill(node string, sizeMiB int) error {
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("fill namespace: %w", err)
	}
	defer f.Close()
	chunk := bytes.Repeat([]byte("ublk-nvmeof bench "), 1<<20/16)[:1<<20]
	for range sizeMiB {
		if _, err := f.Write(chunk); err != nil {
			return fmt.Errorf("fill namespace: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fill namespace: %w", err)
	}
	return nil
}

// connected is a path in use.
type connected struct {
	name string
	*disk
}

// round connects all paths, runs each workload on each of them and disconnects.
// The memory of the servers, which have served then, goes to servers.
func (g *guest) round(ctx context.Context, round int, servers map[string]*serverInfo) (err error) {
	// Neighbours in time are what is compared; who comes first changes.
	order := slices.Clone(g.plan.Paths)
	first := (round - 1) % len(order)
	order = append(order[first:], order[:first]...)

	var disks []connected
	defer func() {
		for _, d := range disks {
			if cerr := d.close(ctx); cerr != nil {
				err = errors.Join(err, g.fail(ctx, d.name, "disconnect", cerr))
			}
		}
	}()
	for _, name := range order {
		p, err := pathNamed(name)
		if err != nil {
			return err
		}
		d, err := p.connect(ctx, g.plan)
		if err != nil {
			if err := g.fail(ctx, name, "connect", err); err != nil {
				return err
			}
			continue
		}
		disks = append(disks, connected{name, d})
	}
	for _, name := range g.plan.Workloads {
		w, err := workloadNamed(name)
		if err != nil {
			return err
		}
		for i := range disks {
			s, err := g.measure(ctx, w, disks, i)
			if err != nil {
				if err := g.fail(ctx, disks[i].name, name, err); err != nil {
					return err
				}
				continue
			}
			s.Round = round
			if err := g.emit(event{Sample: &s}); err != nil {
				return err
			}
		}
	}
	for _, d := range disks {
		if d.server == 0 {
			continue
		}
		use, err := readTaskUse(d.server)
		if err != nil {
			return err
		}
		rss, err := residentMemory(d.server)
		if err != nil {
			return err
		}
		servers[d.name] = &serverInfo{Path: d.name, RSS: rss, Threads: len(use.threads)}
	}
	return nil
}

// snapshot is the state at one moment of a load.
type snapshot struct {
	cpu     cpuUse
	bytes   uint64         // of the disk under load, since it is there
	servers []taskUse      // by disk
	calls   map[int]uint64 // system calls; only when they are counted
	mark    string         // the instructions so far; only when they are counted
}

// measure runs a workload on one of the disks.
func (g *guest) measure(ctx context.Context, w workload, disks []connected, loaded int) (sample, error) {
	if beside := disks[loaded].beside; beside != nil {
		during, stop := context.WithCancel(ctx)
		var ended sync.WaitGroup
		ended.Go(func() { beside(during) })
		defer ended.Wait()
		defer stop()
	}
	r, err := g.load(ctx, w, disks[loaded].disk, func(s *snapshot) error {
		for _, d := range disks {
			u, err := readTaskUse(d.server)
			if err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
			s.servers = append(s.servers, u)
		}
		return nil
	})
	if err != nil {
		return sample{}, err
	}
	from, to, elapsed := r.from, r.to, r.to.cpu.at.Sub(r.from.cpu.at)
	s := sample{
		Workload: w.name, Path: disks[loaded].name, P50: r.fio.p50, P99: r.fio.p99, P999: r.fio.p999,
		IOs: r.ios, IOPS: float64(r.ios) / elapsed.Seconds(), FioIOPS: r.fio.iops,
		CPUPerIO:      perIO(float64(busy(from.cpu, to.cpu, g.plan.CPUs)), r.ios),
		SwitchesPerIO: perIO(float64(to.cpu.switches-from.cpu.switches), r.ios),
	}
	for i := range disks {
		run := to.servers[i].run - from.servers[i].run
		if i == loaded {
			s.ServerPerIO = perIO(float64(run), r.ios)
			s.SleepsPerIO = perIO(float64(to.servers[i].sleeps-from.servers[i].sleeps), r.ios)
		} else {
			s.IdlePercent += 100 * run.Seconds() / elapsed.Seconds()
		}
	}
	return s, nil
}

const (
	// beginBytes is what has to be transferred before fio counts as running:
	// more than a partition scan reads.
	beginBytes = 1 << 20
	// loadAttempts is how often a load is run if it could not be watched.
	loadAttempts = 3
)

// errUnwatched is a load that was over before enough of it was seen. In mode
// icount QEMU now and then lets a CPU stand still for a second, and the watcher
// with it.
var errUnwatched = errors.New("the load could not be watched for long enough")

// loadResult is a load that was watched from one snapshot to another.
type loadResult struct {
	fio      fioResult
	from, to snapshot
	ios      uint64 // between them
}

// load runs a workload on a disk. Meanwhile it takes snapshots, with what take
// adds to them, and picks two that are far apart in the measured time.
func (g *guest) load(ctx context.Context, w workload, d *disk, take func(*snapshot) error) (loadResult, error) {
	for attempt := 1; ; attempt++ {
		res, shots, err := g.fio(ctx, w, d, take)
		if err != nil {
			return loadResult{}, err
		}
		if to := window(shots, g.plan.Runtime); to > 0 {
			return loadResult{res, shots[0], shots[to], (shots[to].bytes - shots[0].bytes) / uint64(w.block)}, nil
		}
		if attempt == loadAttempts {
			return loadResult{}, errUnwatched
		}
	}
}

// window picks the snapshot, by index, that a load is measured to, from the
// first one on: the last one before nine tenths of the time are over after which
// there was still more to come. It is 0 if that is less than a quarter of the
// time.
func window(shots []snapshot, runtime time.Duration) (to int) {
	for i := 1; i+1 < len(shots); i++ {
		if shots[i].cpu.at.Sub(shots[0].cpu.at) <= runtime*9/10 && shots[i+1].bytes > shots[i].bytes {
			to = i
		}
	}
	if to > 0 && shots[to].cpu.at.Sub(shots[0].cpu.at) < runtime/4 {
		return 0
	}
	return to
}

// fio runs a workload, and takes snapshots from the end of the ramp on.
func (g *guest) fio(ctx context.Context, w workload, d *disk, take func(*snapshot) error) (fioResult, []snapshot, error) {
	// A server that stops to answer must not hold up the others' measurement.
	ctx, cancel := context.WithTimeout(ctx, stepTimeout+g.plan.Ramp+g.plan.Runtime)
	defer cancel()
	before, err := transferred(d.node)
	if err != nil {
		return fioResult{}, nil, err
	}
	line := append(append(slices.Clone(d.prefix), "fio"), w.arguments(d.node, g.plan.CPUs, g.plan.Ramp, g.plan.Runtime)...)
	if d.memory != "" {
		line = append(line, "--mem="+d.memory)
	}
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return fioResult{}, nil, err
	}
	over := make(chan struct{})
	var ended error // written before over is closed
	go func() {
		defer close(over)
		ended = cmd.Wait()
	}()

	var shots []snapshot
	watched := poll(ctx, func() (bool, error) {
		select {
		case <-over:
			return false, errors.New("it ended before its first I/O")
		default:
		}
		now, err := transferred(d.node)
		return now-before >= beginBytes, err
	})
	if watched == nil {
		// Nothing of what follows waits for the VM's host.
		g.clock.release()
		shots, watched = g.watch(d.node, take, over)
		g.clock.hold()
	}
	if watched != nil {
		cancel()
	}
	<-over
	if ended != nil || watched != nil {
		return fioResult{}, nil, fmt.Errorf("fio: %w: %s", cmp.Or(watched, ended), strings.TrimSpace(complaint.String()))
	}
	res, err := parseFio(out.Bytes())
	return res, shots, err
}

// watch takes snapshots until a load that has just begun is over.
func (g *guest) watch(node string, take func(*snapshot) error, over <-chan struct{}) ([]snapshot, error) {
	var shots []snapshot
	next := time.NewTimer(g.plan.Ramp)
	defer next.Stop()
	for {
		select {
		case <-over:
			return shots, nil
		case <-next.C:
		}
		var s snapshot
		if err := take(&s); err != nil {
			return nil, err
		}
		var err error
		if s.bytes, err = transferred(node); err != nil {
			return nil, err
		}
		if s.cpu, err = readCPUUse(); err != nil {
			return nil, err
		}
		shots = append(shots, s)
		next.Reset(g.plan.Runtime / 5) // a snapshot costs the others some milliseconds
	}
}

// idle watches each server while its device is up and unused.
func (g *guest) idle(ctx context.Context) error {
	names := slices.Clone(g.plan.Paths)
	if slices.Contains(names, pathOurs) && !slices.Contains(names, pathOursPoll) {
		names = append(names, pathOursPoll)
	}
	for _, name := range names {
		err := g.alone(ctx, name, func(d *disk) error {
			g.clock.release()
			defer g.clock.hold()
			// What belongs to starting is not idling.
			if err := sleep(ctx, time.Second); err != nil {
				return err
			}
			from, err := readTaskUse(d.server)
			if err != nil {
				return err
			}
			start := time.Now()
			if err := sleep(ctx, g.plan.Idle); err != nil {
				return err
			}
			to, err := readTaskUse(d.server)
			if err != nil {
				return err
			}
			percent := 100 * (to.run - from.run).Seconds() / time.Since(start).Seconds()
			return g.emit(event{Server: &serverInfo{Path: name, IdlePercent: &percent}})
		})
		if err := g.passed(ctx, name, "idle", err); err != nil {
			return err
		}
	}
	return nil
}

// syscalls counts each server's system calls under load.
func (g *guest) syscalls(ctx context.Context) error {
	w, err := workloadNamed(syscallLoad)
	if err != nil {
		return err
	}
	if err := traceSyscalls(); err != nil {
		return g.fail(ctx, "", "system calls", err)
	}
	for _, name := range g.plan.Paths {
		err := g.alone(ctx, name, func(d *disk) error {
			use, err := readTaskUse(d.server)
			if err != nil {
				return err
			}
			r, err := g.load(ctx, w, d, func(s *snapshot) error {
				var err error
				s.calls, err = readSyscalls(use.threads)
				return err
			})
			if err != nil {
				return err
			}
			info := serverInfo{Path: name, SyscallLoad: w.name, SyscallsPerIO: make(map[string]float64)}
			for number, n := range r.to.calls {
				if n -= r.from.calls[number]; n > 0 {
					info.SyscallsPerIO[syscallName(number)] = perIO(float64(n), r.ios)
				}
			}
			if len(info.SyscallsPerIO) == 0 {
				return fmt.Errorf("no system call of %d threads was seen", len(use.threads))
			}
			return g.emit(event{Server: &info})
		})
		if err := g.passed(ctx, name, "system calls", err); err != nil {
			return err
		}
	}
	return nil
}

// passed turns an error of one path into a reported failure.
func (g *guest) passed(ctx context.Context, name, where string, err error) error {
	if err == nil {
		return nil
	}
	return g.fail(ctx, name, where, err)
}

// alone connects a path that has a server, with no other beside it.
func (g *guest) alone(ctx context.Context, name string, do func(*disk) error) error {
	if name == pathKernel {
		return nil
	}
	p, err := pathNamed(name)
	if err != nil {
		return err
	}
	d, err := p.connect(ctx, g.plan)
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.close(ctx))
}
