package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// allocationsFile lists how often each micro-benchmark allocates for an operation.
const allocationsFile = "bench/allocations.txt"

// notListed are the benchmarks that no I/O passes through, or that compare two ways in rounds of
// their own. They are for people.
const notListed = "^Benchmark(Authentication|Batch32|Calls1|Calls32|Loss|Run|Scrape|Suite|Verbs|ZeroCopy)$|^BenchmarkRead$/./tcp"

// allocationsMain runs each micro-benchmark of this tree for a fixed number of operations, and
// compares how often it allocates for an operation with allocationsFile. It measures no time, so
// what else the machine does has no effect.
func allocationsMain(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench allocations", flag.ContinueOnError)
	accept := flags.Bool("accept", false, "write "+allocationsFile)
	if err := flags.Parse(args); err != nil {
		return err
	}
	root, err := repository()
	if err != nil {
		return err
	}
	packages, err := benchmarkPackages(root)
	if err != nil {
		return err
	}
	// Allocations before the first operation vanish among so many. GOMAXPROCS is a part of the names.
	arguments := append([]string{"test", "-run=^$", "-bench=.", "-skip=" + notListed, "-benchmem", "-benchtime=1000x", "-count=2", "-cpu=2"}, packages...)
	var out bytes.Buffer
	run := exec.CommandContext(ctx, "go", arguments...)
	run.Dir, run.Stdout, run.Stderr = root, &out, os.Stderr
	if err := run.Run(); err != nil {
		return fmt.Errorf("benchmarks: %w: %s", err, lastLine(out.String()))
	}
	got := make(map[string]int)
	for name, n := range allocations(&out) {
		got[strings.TrimSuffix(name, "-2")] = n
	}
	file := filepath.Join(root, filepath.FromSlash(allocationsFile))
	if *accept {
		return os.WriteFile(file, []byte(formatAllocations(got)), 0o644)
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	want, err := readAllocations(f)
	if err != nil {
		return fmt.Errorf("%s: %w", allocationsFile, err)
	}
	if differ := differentAllocations(want, got); len(differ) > 0 {
		return fmt.Errorf("%s\n\"go run ./bench allocations -accept\" writes what was found to %s", strings.Join(differ, "\n"), allocationsFile)
	}
	fmt.Printf("%d micro-benchmarks allocate as often as %s says\n", len(got), allocationsFile)
	return nil
}

// benchmarkPackages returns the directories below root that have a benchmark, as arguments of go.
func benchmarkPackages(root string) ([]string, error) {
	found := make(map[string]bool)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "e2e"): // e2e is another module
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("\nfunc Benchmark")) {
			dir, rerr := filepath.Rel(root, filepath.Dir(path))
			err = errors.Join(err, rerr)
			found["./"+filepath.ToSlash(dir)] = true
		}
		return err
	})
	return slices.Sorted(maps.Keys(found)), err
}

// differentAllocations describes each benchmark whose allocations are not those that are wanted.
// Fewer are no fault of a change, but want says so then, too.
func differentAllocations(want, got map[string]int) []string {
	var differ []string
	for name, n := range got {
		switch had, ok := want[name]; {
		case !ok:
			differ = append(differ, fmt.Sprintf("%s is not listed; it allocates %d times for an operation", name, n))
		case n != had:
			differ = append(differ, fmt.Sprintf("%s allocates %d times for an operation, want %d", name, n, had))
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			differ = append(differ, name+" is listed, but did not run")
		}
	}
	slices.Sort(differ)
	return differ
}

// formatAllocations writes a line for each benchmark, in the order of their names.
func formatAllocations(n map[string]int) string {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(n)) {
		fmt.Fprintf(&text, "%s %d\n", name, n[name])
	}
	return text.String()
}

// readAllocations reads what formatAllocations has written.
func readAllocations(r io.Reader) (map[string]int, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	n := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		var name string
		var count int
		if _, err := fmt.Sscanf(line, "%s %d\n", &name, &count); err != nil {
			return nil, fmt.Errorf("line %q: want a benchmark and its allocations", strings.TrimSuffix(line, "\n"))
		}
		n[name] = count
	}
	return n, nil
}
