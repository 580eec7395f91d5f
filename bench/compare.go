package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// benchstat prints the comparison.
const benchstat = "golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da"

// compareMain compares the micro-benchmarks of this tree with those of another revision, on
// this machine. The two take turns, so that what else the machine does affects both. benchstat
// prints the result. The error names the benchmarks that allocate more often than before.
func compareMain(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("bench compare", flag.ContinueOnError)
	base := fs.String("base", "HEAD", "`revision` to compare with")
	rounds := fs.Int("rounds", 6, "times that each benchmark is run")
	pattern := fs.String("bench", ".", "benchmarks to run, a regular `expression`")
	runtime := fs.String("benchtime", "100ms", "`time` of each run, or the number of its operations, as 100x")
	if err := fs.Parse(args); err != nil {
		return err
	}
	packages := fs.Args()
	if len(packages) == 0 {
		packages = []string{"./..."}
	}
	root, err := repository()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-compare-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := extract(ctx, root, *base, filepath.Join(dir, "tree")); err != nil {
		return err
	}
	trees := []tree{{name: "base", dir: filepath.Join(dir, "tree")}, {name: "head", dir: root}}
	arguments := append([]string{"test", "-p=1", "-run=^$", "-benchmem", "-bench=" + *pattern, "-benchtime=" + *runtime}, packages...)
	for i := range *rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", i+1, *rounds)
		for t := range trees {
			if err := trees[t].run(ctx, arguments); err != nil {
				return err
			}
		}
	}
	files := []string{"run", benchstat}
	for _, t := range trees {
		file := filepath.Join(dir, t.name)
		if err := os.WriteFile(file, t.out.Bytes(), 0o644); err != nil {
			return err
		}
		files = append(files, t.name+"="+file)
	}
	show := exec.CommandContext(ctx, "go", files...)
	show.Stdout, show.Stderr = os.Stdout, os.Stderr
	if err := show.Run(); err != nil {
		return fmt.Errorf("benchstat: %w", err)
	}
	more := moreAllocations(&trees[0].out, &trees[1].out)
	if len(more) > 0 {
		return fmt.Errorf("more allocations than at %s: %s", *base, strings.Join(more, ", "))
	}
	return nil
}

// extract puts the files of a revision into a new directory.
func extract(ctx context.Context, root, revision, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	archive := exec.CommandContext(ctx, "git", "-C", root, "archive", revision)
	unpack := exec.CommandContext(ctx, "tar", "-x", "-C", dir)
	archive.Stderr, unpack.Stderr = os.Stderr, os.Stderr
	var err error
	if unpack.Stdin, err = archive.StdoutPipe(); err != nil {
		return err
	}
	if err := unpack.Start(); err != nil {
		return err
	}
	if err := errors.Join(archive.Run(), unpack.Wait()); err != nil {
		return fmt.Errorf("extract %s: %w", revision, err)
	}
	return nil
}

// tree is one of the two trees, with what its benchmarks have printed.
type tree struct {
	name, dir string
	out       bytes.Buffer
}

func (t *tree) run(ctx context.Context, arguments []string) error {
	cmd := exec.CommandContext(ctx, "go", arguments...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = t.dir, &t.out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("benchmarks of %s: %w: %s", t.name, err, lastLine(t.out.String()))
	}
	return nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// moreAllocations returns the benchmarks whose least number of allocations for an operation
// has grown, by more than 2 %. The least one, because the runtime allocates at times, too.
func moreAllocations(base, head io.Reader) []string {
	before, after := allocations(base), allocations(head)
	var more []string
	for name, n := range after {
		if had, ok := before[name]; ok && n > had+had/50 {
			more = append(more, fmt.Sprintf("%s (%d, was %d)", name, n, had))
		}
	}
	slices.Sort(more)
	return more
}

// allocations reads the least number of allocations of each benchmark, by package and name.
func allocations(r io.Reader) map[string]int {
	least := make(map[string]int)
	pkg := ""
	for in := bufio.NewScanner(r); in.Scan(); {
		fields := strings.Fields(in.Text())
		if len(fields) == 2 && fields[0] == "pkg:" {
			pkg = fields[1]
		}
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") || fields[len(fields)-1] != "allocs/op" {
			continue
		}
		n, err := strconv.Atoi(fields[len(fields)-2])
		if err != nil {
			continue
		}
		name := pkg + "." + fields[0]
		if had, ok := least[name]; !ok || n < had {
			least[name] = n
		}
	}
	return least
}
