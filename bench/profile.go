package main

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	_ "embed" // the plugin
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

//go:embed plugin/instructions.c
var plugin []byte

// profile is the instructions of one workload over one path, counted between two marks.
type profile struct {
	Workload string `json:"workload"`
	Path     string `json:"path"`
	From     string `json:"from"` // names of the marks
	To       string `json:"to"`
	IOs      uint64 `json:"ios"`
}

// profileMain counts in a VM of mode icount which functions execute how many instructions for an
// I/O, of the kernel and of the programs. Nothing is sampled: QEMU counts each block of code.
func profileMain(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench profile", flag.ContinueOnError)
	o := options{mtu: 4200, memory: "4G", command: strings.Join(append([]string{"profile"}, args...), " ")}
	fs.StringVar(&o.kernel, "kernel", "7.3", "kernel `series` to boot")
	only := fs.String("only", "", "`workloads` to run, comma-separated; default all")
	paths := fs.String("paths", "kernel,ours", "`paths` to run, comma-separated")
	fs.StringVar(&o.params, "append", "", "more `parameters` of the VM's kernel")
	fs.StringVar(&o.label, "label", "", "`text` added to the names of the result files")
	fs.DurationVar(&o.plan.Runtime, "runtime", time.Second, "measured `time` of one fio run, on the guest's clock")
	fs.DurationVar(&o.timeout, "timeout", time.Hour, "longest `time` for the VM")
	top := fs.Int("top", 25, "`functions` to list for each workload")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var err error
	if o.plan.Workloads, err = choose("--only", *only, workloadNames()); err != nil {
		return err
	}
	if o.plan.Paths, err = choose("--paths", *paths, pathNames()); err != nil {
		return err
	}
	o.plan.CPUs, o.plan.Queues, o.plan.SizeMiB, o.plan.Ramp = 2, 2, 128, o.plan.Runtime/2
	root, err := repository()
	if err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := build(ctx, o.plan.Paths); err != nil {
		return err
	}
	o.plan.Lab, o.plan.Ours = filepath.Join(root, "e2e", "lab.sh"), filepath.Join(root, "build", "ublk-nvmeof")
	dir, err := os.MkdirTemp("", "bench-profile")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	profiles, err := o.profile(ctx, dir)
	if err != nil {
		return err
	}
	s, err := readSymbols(filepath.Join(dir, "kallsyms"), o.plan.Ours)
	if err != nil {
		return err
	}
	loads, err := countLoads(dir, o.plan.Workloads, profiles, s)
	if err != nil {
		return err
	}
	text := profileMarkdown(o.environment(modeICount), loads, *top)
	fmt.Print(text)
	name := time.Now().UTC().Format("2006-01-02") + "-" + o.kernel + "-profile"
	if o.label != "" {
		name += "-" + o.label
	}
	return errors.Join(
		os.WriteFile(filepath.Join("bench", "results", name+".md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join("docs", "instructions.svg"), []byte(stagesSVG(bars(loads))), 0o644))
}

// profile boots a VM whose QEMU has the plugin.
func (o options) profile(ctx context.Context, dir string) ([]profile, error) {
	source, object := filepath.Join(dir, "instructions.c"), filepath.Join(dir, "instructions.so")
	if err := os.WriteFile(source, plugin, 0o644); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", object, source).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile the plugin: %w: %s", err, out)
	}
	const qemu = "qemu-system-x86_64"
	emulator, err := exec.LookPath(qemu)
	if err != nil {
		return nil, err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" -plugin %s,dir=%s\n", emulator, object, dir)
	if err := os.WriteFile(filepath.Join(dir, qemu), []byte(script), 0o755); err != nil {
		return nil, err
	}
	plan, err := json.Marshal(o.plan)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "build/vm", "--kernel", o.kernel, "--cpus", strconv.Itoa(o.plan.CPUs), "--mem", o.memory,
		"--mtu", strconv.Itoa(o.mtu), "--timeout", o.timeout.String(), "--icount", "--append", "nokaslr "+o.params, "--out", dir,
		"--", self, "profile-guest", string(plan), dir)
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(&out, os.Stderr)
	err = cmd.Run()
	var profiles []profile
	for line := range bytes.Lines(out.Bytes()) {
		var p profile
		if json.Unmarshal(line, &p) == nil && p.IOs > 0 {
			profiles = append(profiles, p)
		}
	}
	return profiles, err
}

// profileGuest is the program in the VM; its arguments are the plan and the directory of the marks.
func profileGuest(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: profile-guest PLAN DIR")
	}
	g := guest{out: json.NewEncoder(os.Stdout)}
	if err := json.Unmarshal([]byte(args[0]), &g.plan); err != nil {
		return fmt.Errorf("parse plan: %w", err)
	}
	dir := args[1]
	g.clock.use = true
	g.clock.hold()
	defer g.clock.release()
	if err := g.prepare(ctx); err != nil {
		return err
	}
	symbols, err := os.ReadFile("/proc/kallsyms") // with the modules
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "kallsyms"), symbols, 0o644); err != nil {
		return err
	}
	for _, name := range g.plan.Paths {
		p, err := pathNamed(name)
		if err != nil {
			return err
		}
		d, err := p.connect(ctx, g.plan)
		if err != nil {
			return err
		}
		for _, load := range g.plan.Workloads {
			if err = g.mark(ctx, dir, load, name, d); err != nil {
				break
			}
		}
		if err := errors.Join(err, d.close(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// mark runs a workload and has the instructions counted at each snapshot.
func (g *guest) mark(ctx context.Context, dir, load, path string, d *disk) error {
	w, err := workloadNamed(load)
	if err != nil {
		return err
	}
	n := 0
	r, err := g.load(ctx, w, d, func(s *snapshot) error {
		n++
		s.mark = fmt.Sprintf("%s.%s.%d", load, path, n)
		temporary, mark := filepath.Join(dir, "mark.new"), filepath.Join(dir, "mark")
		if err := os.WriteFile(temporary, []byte(s.mark+"\n"), 0o644); err != nil {
			return err
		}
		if err := os.Rename(temporary, mark); err != nil {
			return err
		}
		return poll(ctx, func() (bool, error) {
			_, err := os.Stat(mark)
			return errors.Is(err, os.ErrNotExist), nil
		})
	})
	if err != nil {
		return err
	}
	return g.out.Encode(profile{Workload: load, Path: path, From: r.from.mark, To: r.to.mark, IOs: r.ios})
}

// symbols finds functions by address. Programs other than ours have none.
type symbols struct {
	addresses []uint64
	names     []string
}

// Bounds of code: that of the kernel is above, and that of our program, which is linked to a
// fixed address, below. What is between is of libraries and other programs.
const (
	kernelCode  = 1 << 63
	programCode = 1 << 30
)

func readSymbols(kallsyms, program string) (*symbols, error) {
	type symbol struct {
		address uint64
		name    string
	}
	var all []symbol
	file, err := os.Open(program)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	f, err := elf.NewFile(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", program, err)
	}
	table, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("symbols of %s: %w", program, err)
	}
	for _, s := range table {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Value != 0 {
			all = append(all, symbol{s.Value, "go:" + s.Name})
		}
	}
	all = append(all, symbol{programCode, "libraries and fio"})
	data, err := os.ReadFile(kallsyms)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		field := strings.Fields(line)
		if len(field) < 3 || !strings.ContainsAny(field[1], "tTwW") {
			continue
		}
		address, err := strconv.ParseUint(field[0], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("parse kallsyms: %w", err)
		}
		all = append(all, symbol{address, strings.Join(field[2:], " ")})
	}
	slices.SortStableFunc(all, func(a, b symbol) int {
		switch {
		case a.address < b.address:
			return -1
		case a.address > b.address:
			return 1
		}
		return 0
	})
	s := &symbols{}
	for _, one := range all {
		s.addresses, s.names = append(s.addresses, one.address), append(s.names, one.name)
	}
	return s, nil
}

func (s *symbols) find(address uint64) string {
	if address >= programCode && address < kernelCode {
		address = programCode
	}
	i, found := slices.BinarySearch(s.addresses, address)
	if !found {
		i--
	}
	if i < 0 {
		return "unknown"
	}
	return s.names[i]
}

// stages are the parts of the work, by the functions that do it. The first that matches counts.
var stages = []struct {
	name string
	of   *regexp.Regexp
}{
	{"copy to or from memory of programs", regexp.MustCompile(`^(rep_movs_alternative|_copy_(to|from)_(iter|user)|__check_object_size|ublk_copy_user_pages.*)`)},
	{"ours: Go", regexp.MustCompile(`^go:`)},
	{"libraries and fio", regexp.MustCompile(`^libraries`)},
	{"rdma_rxe, both ends", regexp.MustCompile(`rdma_rxe`)},
	{"verbs and RDMA core", regexp.MustCompile(`\[(ib_|rdma_|iw_)`)},
	{"ublk_drv", regexp.MustCompile(`ublk`)},
	{"nvme-rdma", regexp.MustCompile(`\[nvme_`)},
	{"target: nvmet, null_blk", regexp.MustCompile(`\[(nvmet|null_blk)`)},
	{"io_uring", regexp.MustCompile(`^_*io_`)},
	{"other copies, checksums, clearing", regexp.MustCompile(`^(memcpy|memset|memmove|crc32|copy_mc|clear_)`)},
	{"scheduler and timers", regexp.MustCompile(`sched|update_(load|curr|se|cfs)|queue_(task|entity|delayed)|dequeue|pick_|next_task|prev_task|vruntime|cfs|psi_|switch|wake|ttwu|_rq|cpuidle|idle|hrtimer|timerqueue|clockevents|tick_|ktime|pelt|nohz|native_sched|place_entity|resched|prandom`)},
}

// otherStage is the stage of all other functions.
const otherStage = "the rest of the kernel"

// stageOf names the stage of a function.
func stageOf(function string) string {
	for _, s := range stages {
		if s.of.MatchString(function) {
			return s.name
		}
	}
	return otherStage
}

// readCounts reads what the plugin has written, summed by function.
func readCounts(path string, s *symbols) (map[string]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	counts := make(map[string]uint64)
	for in := bufio.NewScanner(f); in.Scan(); {
		address, executed, _ := strings.Cut(in.Text(), " ")
		a, aerr := strconv.ParseUint(address, 16, 64)
		n, nerr := strconv.ParseUint(executed, 10, 64)
		if err := errors.Join(aerr, nerr); err != nil {
			return nil, fmt.Errorf("parse %s: %w", path, err)
		}
		counts[s.find(a)] += n
	}
	return counts, nil
}

// perFunction is the instructions for an I/O by function.
func (p profile) perFunction(dir string, s *symbols) (map[string]float64, error) {
	from, err := readCounts(filepath.Join(dir, p.From), s)
	if err != nil {
		return nil, err
	}
	to, err := readCounts(filepath.Join(dir, p.To), s)
	if err != nil {
		return nil, err
	}
	each := make(map[string]float64)
	for name, n := range to {
		each[name] = perIO(float64(n-from[name]), p.IOs)
	}
	return each, nil
}

// counted is the instructions for an I/O of one workload, by path and function.
type counted struct {
	workload  string
	paths     []string
	functions []map[string]float64
}

// countLoads reads the counts of all workloads that were measured.
func countLoads(dir string, workloads []string, profiles []profile, s *symbols) ([]counted, error) {
	var all []counted
	for _, w := range workloads {
		c := counted{workload: w}
		for _, p := range profiles {
			if p.Workload != w {
				continue
			}
			each, err := p.perFunction(dir, s)
			if err != nil {
				return nil, err
			}
			c.paths, c.functions = append(c.paths, p.Path), append(c.functions, each)
		}
		if len(c.paths) > 0 {
			all = append(all, c)
		}
	}
	return all, nil
}

func bars(loads []counted) []bar {
	var all []bar
	for _, c := range loads {
		for i, sums := range byStage(c.functions) {
			all = append(all, bar{c.workload, c.paths[i], sums})
		}
	}
	return all
}

func profileMarkdown(e environment, loads []counted, top int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Instructions for an I/O, kernel %s\n\n%s, commit %s, %s, %s. Flags: `%s`.\n", e.Series,
		e.Date.Format("2006-01-02 15:04 MST"), e.Commit, e.Go, e.QEMU, e.Command)
	b.WriteString("Of all CPUs, host and target, counted by block of code, nothing sampled. One instruction is two nanoseconds of the mode icount.\n\n")
	for _, c := range loads {
		fmt.Fprintf(&b, "## %s\n\n", c.workload)
		instructionTable(&b, "stage", c.paths, byStage(c.functions), len(stages)+1, true)
		instructionTable(&b, "function", c.paths, c.functions, top, false)
	}
	return b.String()
}

func byStage(functions []map[string]float64) []map[string]float64 {
	var sums []map[string]float64
	for _, each := range functions {
		sum := make(map[string]float64)
		for name, n := range each {
			sum[stageOf(name)] += n
		}
		sums = append(sums, sum)
	}
	return sums
}

// instructionTable lists the largest rows of the last path.
func instructionTable(b *strings.Builder, what string, names []string, columns []map[string]float64, limit int, total bool) {
	row(b, append([]string{what}, names...))
	rule(b, len(names)+1)
	last := columns[len(columns)-1]
	var rows []string
	for _, column := range columns {
		for name := range column {
			rows = append(rows, name)
		}
	}
	slices.Sort(rows)
	rows = slices.Compact(rows)
	slices.SortStableFunc(rows, func(x, y string) int { return int(last[y]) - int(last[x]) })
	for _, name := range rows[:min(limit, len(rows))] {
		cells := []string{name}
		for _, column := range columns {
			cells = append(cells, humanize.Comma(int64(column[name])))
		}
		row(b, cells)
	}
	if total {
		cells := []string{"sum"}
		for _, column := range columns {
			sum := 0.0
			for _, n := range column {
				sum += n
			}
			cells = append(cells, humanize.Comma(int64(sum)))
		}
		row(b, cells)
	}
	b.WriteString("\n")
}
