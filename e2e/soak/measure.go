package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// usage is what a process has.
type usage struct {
	rss                              int // KiB; those of I/O buffers of a server do not count
	descriptors, threads, goroutines int
}

func (u usage) String() string {
	text := fmt.Sprintf("%d KiB resident, %d descriptors, %d threads", u.rss, u.descriptors, u.threads)
	if u.goroutines > 0 {
		text += fmt.Sprintf(", %d goroutines", u.goroutines)
	}
	return text
}

func (u usage) max(v usage) usage {
	return usage{max(u.rss, v.rss), max(u.descriptors, v.descriptors), max(u.threads, v.threads), max(u.goroutines, v.goroutines)}
}

// exceeds says what is more than before, beyond what varies: the heap is larger shortly
// before a collection, and Go's runtime keeps threads, of which the queues of each path need some at
// the same time.
func (u usage) exceeds(before usage, paths int) string {
	var more []string
	for _, c := range []struct {
		what                string
		got, limit, started int
	}{
		{"KiB resident", u.rss, before.rss + before.rss/4 + 16<<10, before.rss},
		{"descriptors", u.descriptors, before.descriptors + 4, before.descriptors},
		{"threads", u.threads, before.threads + 8*paths, before.threads},
		{"goroutines", u.goroutines, before.goroutines + 4, before.goroutines},
	} {
		if c.got > c.limit {
			more = append(more, fmt.Sprintf("%d %s, %d at the start", c.got, c.what, c.started))
		}
	}
	return strings.Join(more, "; ")
}

// measure measures a process.
func measure(pid int) usage {
	var u usage
	dir := fmt.Sprintf("/proc/%d/", pid)
	text, err := os.ReadFile(dir + "status")
	if err != nil {
		fatalf("%v", err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "VmRSS:":
			u.rss, _ = strconv.Atoi(f[1])
		case len(f) > 1 && f[0] == "Threads:":
			u.threads, _ = strconv.Atoi(f[1])
		}
	}
	files, err := os.ReadDir(dir + "fd")
	if err != nil {
		fatalf("%v", err)
	}
	u.descriptors = len(files)
	return u
}

// measureServer leaves out the I/O buffers that are registered. A server registers them when
// requests need them, at most all.
func (s *soak) measureServer() usage {
	server := s.server()
	u := measure(server.PID)
	u.rss -= server.RegisteredBytes >> 10
	return u
}

// measureTarget relies on ip, which becomes the command that it runs.
func (s *soak) measureTarget() usage { return measure(s.target.Process.Pid) }
