// Soak runs the target and a server with a socket for NBD clients in two network
// namespaces, and is the cables between them: one for each path. It keeps the exports busy, checks
// everything that is read, and breaks what can be broken, in random order.
// e2e/soak-native.sh makes the network namespaces; make soak-native runs it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Names that the script and this program agree about.
const (
	hostEnd   = "soak-host"   // the network namespace with the interfaces soak-host0, soak-host1 and so on
	targetEnd = "soak-target" // that of the other ends, in the same way
	nqn       = "nqn.2026-01.org.example:soak"
	nsMiB     = 64
)

// Addresses of the ends of a cable
func targetAddr(path int) string { return fmt.Sprintf("10.0.%d.1", 5+path) }
func hostAddr(path int) string   { return fmt.Sprintf("10.0.%d.2", 5+path) }

// progressLimit is how long the I/O of an export may stand still after a fault has
// ended. An answer that is lost costs the I/O timeout of 30 s.
const progressLimit = 75 * time.Second

// soak is one run.
type soak struct {
	program, dir string

	cables     []*cable // of the paths
	target     *exec.Cmd
	targetDone chan struct{}
	targetLog  *os.File
	loads      []*load
	fio        *fio
	kills      int // of the server
	deaths     int // of the target
	rounds     map[string]int
	worst      usage // of any server, before its end
	worstOf    usage // of any target
}

var current *soak // for fatalf

var logMu sync.Mutex

func logf(format string, args ...any) {
	logMu.Lock()
	defer logMu.Unlock()
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format("15:04:05.000"), fmt.Sprintf(format, args...))
}

// fatalf ends the soak, with what helps to find the cause.
func fatalf(format string, args ...any) {
	logf("FAILED: "+format, args...)
	logMu.Lock() // for good: nobody else fails
	for _, args := range [][]string{{"list", "-v"}, {"target", "list", "-v"}} {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := exec.CommandContext(ctx, current.program, append(args, "--run-dir", current.runDir())...).CombinedOutput()
		cancel()
		fmt.Fprintf(os.Stderr, "%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	files, _ := filepath.Glob(current.runDir() + "/*/log")
	for _, file := range files {
		text, _ := os.ReadFile(file)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(os.Stderr, "%s:\n%s\n", file, strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
	os.Exit(1)
}

func (s *soak) runDir() string { return filepath.Join(s.dir, "run") }

func main() {
	minutes := flag.Float64("minutes", 15, "how long faults happen")
	program := flag.String("program", "build/ublk-nvmeof", "the program")
	dir := flag.String("dir", "", "directory for everything that is made")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the order of faults")
	paths := flag.Int("paths", 2, "paths between host and target")
	only := flag.String("only", "", "names of faults, separated by commas (default: all)")
	flag.Parse()
	s := &soak{program: *program, dir: *dir, cables: make([]*cable, *paths), rounds: map[string]int{}}
	current = s
	if err := os.MkdirAll(s.runDir(), 0o755); err != nil {
		fatalf("%v", err)
	}
	logf("seed %d", *seed)
	s.run(time.Duration(*minutes*float64(time.Minute)), rand.New(rand.NewPCG(*seed, 0)), *only)
}

// run is the whole soak.
func (s *soak) run(length time.Duration, random *rand.Rand, only string) {
	for _, name := range []string{"1", "2", "3"} {
		if err := os.WriteFile(filepath.Join(s.dir, "ns"+name), make([]byte, nsMiB<<20), 0o600); err != nil {
			fatalf("%v", err)
		}
	}
	for path := range s.cables {
		s.connect(path)
	}
	s.startTarget("0s")
	args := []string{"connect", "-a", targetAddr(0), "-n", nqn, "-q", "nqn.2026-01.org.example:soak-host", "-I", "66666666-6666-6666-6666-666666666666",
		"-i", "2", "-W", "2", "-P", "1", "-k", "2", "-c", "1", "-l", "-1", "--provider", "roce", "--nbd-socket", filepath.Join(s.dir, "nbd.sock"), "--namespace", "1,2,3"}
	for path := range s.cables[1:] {
		args = append(args, "--path", targetAddr(path+1))
	}
	s.host(args...)
	socket := filepath.Join(s.dir, "nbd.sock")
	const blocks = nsMiB << 20 / blockSize
	s.loads = []*load{
		startLoad(newDisk(1, blocks, false), socket, "1", 2, 4),
		startLoad(newDisk(2, blocks, true), socket, "2", 2, 4),
	}
	s.fio = startFio(socket, s.dir)

	// The first measurement is of a server and a target that have lived for a while.
	time.Sleep(10 * time.Second)
	first, firstTarget := s.measureServer(), s.measureTarget()
	first.goroutines = s.stacks("ctrl0", s.serverPID)
	s.recover()
	firstTarget.goroutines = s.endTarget(syscall.SIGQUIT)
	s.startTarget("0s")
	s.progress("start")

	faults := s.faults(random, only)
	end := time.Now().Add(length)
	lastKill := time.Now().Add(length * 3 / 4) // then one server and one target live on
	for settled := false; time.Now().Before(end); {
		if !settled && time.Until(end) < length/8 {
			settled = true
			// What is torn down and made anew leaves garbage, of which the heap keeps some times as much
			// as it needs (process.Prepare). It has that by now.
			used := s.measureServer()
			logf("server, without I/O buffers, after %v of faults: %v", (length / 8).Round(time.Second), used)
			first.rss = max(first.rss, used.rss)
		}
		f := faults[random.IntN(len(faults))]
		if f.kills && time.Now().After(lastKill) {
			continue
		}
		began := time.Now()
		logf("%s", f.name)
		f.run()
		s.control("clear")
		s.progress(f.name)
		s.rounds[f.name]++
		if took := time.Since(began); took > 40*time.Second {
			logf("%s took %v", f.name, took.Round(time.Second))
		}
	}

	// The same again as for the first measurement.
	s.treat(s.cables, condition{})
	s.control("clear")
	s.control("grant", "128")
	s.progress("all")
	time.Sleep(10 * time.Second)
	last, lastTarget := s.measureServer(), s.measureTarget()
	last.goroutines = s.stacks("ctrl0", s.serverPID)
	s.recover()
	s.progress("last recover")
	s.fio.finish()
	for _, l := range s.loads {
		l.finish()
	}
	lastTarget.goroutines = s.endTarget(syscall.SIGQUIT)
	s.host("disconnect", "-n", nqn)
	for i, l := range s.loads {
		data, err := os.ReadFile(filepath.Join(s.dir, fmt.Sprint("ns", i+1)))
		if err != nil {
			fatalf("%v", err)
		}
		if err := l.disk.checkAll(data); err != nil {
			fatalf("file of the target: %v", err)
		}
	}
	s.report(first, last, firstTarget, lastTarget)
}

// report prints the figures, and fails if there is more at the end than at the start.
func (s *soak) report(first, last, firstTarget, lastTarget usage) {
	n := 0
	for name, count := range s.rounds {
		n += count
		logf("%4d × %s", count, name)
	}
	logf("%d faults, server killed %d times, target killed %d times", n, s.kills, s.deaths)
	for _, l := range s.loads {
		logf("namespace %d: %d requests, longest took %v, %d connections", l.disk.id, l.requests.Load(),
			time.Duration(l.longest.Load()).Round(time.Millisecond), l.connects())
	}
	for path, c := range s.cables {
		logf("cable %d: %d packets, %d of them lost, doubled, damaged or late", path, c.packets.Load(), c.harmed.Load())
	}
	logf("fio: %s", s.fio.summary())
	logf("server, without I/O buffers: %v at the start, %v at the end, at most %v before a kill", first, last, s.worst)
	logf("target: %v at the start, %v at the end, at most %v before a kill", firstTarget, lastTarget, s.worstOf)
	for _, c := range []struct {
		what          string
		before, after usage
	}{{"server", first, last}, {"target", firstTarget, lastTarget}} {
		if more := c.after.exceeds(c.before, len(s.cables)); more != "" {
			fatalf("%s has more at the end than at the start: %s", c.what, more)
		}
	}
	if left, _ := filepath.Glob(s.runDir() + "/ctrl*"); len(left) > 0 {
		fatalf("left behind: %q", left)
	}
}

// command runs a command that has a minute.
func (s *soak) command(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// host runs the program in the host's network namespace; it must succeed.
func (s *soak) host(args ...string) string {
	out, err := s.command("ip", append([]string{"netns", "exec", hostEnd, s.program}, append(args, "--run-dir", s.runDir())...)...)
	if err != nil {
		fatalf("%v", err)
	}
	return out
}

// control changes the target.
func (s *soak) control(args ...string) {
	if _, err := s.command(s.program, append(append([]string{"target"}, args...), "--run-dir", s.runDir())...); err != nil {
		fatalf("%v", err)
	}
}

// connect lays the cable of a path.
func (s *soak) connect(path int) {
	ends := [2]string{fmt.Sprint(hostEnd, path), fmt.Sprint(targetEnd, path)}
	var err error
	if s.cables[path], err = newCable(ends); err != nil {
		fatalf("cable: %v", err)
	}
	for _, end := range []struct{ name, netns, addr, peer string }{
		{ends[0], hostEnd, hostAddr(path), targetAddr(path)}, {ends[1], targetEnd, targetAddr(path), hostAddr(path)},
	} {
		for _, args := range [][]string{
			{"link", "set", end.name, "netns", end.netns},
			{"-n", end.netns, "addr", "add", end.addr, "peer", end.peer, "dev", end.name},
			{"-n", end.netns, "link", "set", end.name, "mtu", fmt.Sprint(cableMTU), "up"},
		} {
			if _, err := s.command("ip", args...); err != nil {
				fatalf("%v", err)
			}
		}
	}
}

// treat sets how cables treat packets.
func (s *soak) treat(cables []*cable, how condition) {
	for _, c := range cables {
		c.condition.Store(&how)
	}
}

// server is a part of what a server says of itself.
type server struct {
	PID             int
	RegisteredBytes int `json:"registered_bytes"` // of I/O buffers
}

func (s *soak) server() server {
	var out struct{ Controllers []server }
	text := s.host("list", "-o", "json")
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Controllers) != 1 {
		fatalf("list: %v\n%s", err, text)
	}
	return out.Controllers[0]
}

func (s *soak) serverPID() int { return s.server().PID }

// startTarget starts the target, and returns when it listens.
func (s *soak) startTarget(namespacesAfter string) {
	var err error
	if s.targetLog, err = os.Create(filepath.Join(s.dir, "target.log")); err != nil {
		fatalf("%v", err)
	}
	args := []string{"netns", "exec", targetEnd, s.program, "target", "--run-dir", s.runDir(), "--provider", "roce", "-a", targetAddr(0)}
	for path := range s.cables[1:] {
		args = append(args, "--port", targetAddr(path+1))
	}
	s.target = exec.Command("ip", append(args, "-n", nqn, "--retry-delays", "100ms,500ms,2s", "--namespaces-after", namespacesAfter,
		"--namespace", "file="+s.dir+"/ns1", "--namespace", "file="+s.dir+"/ns2,cache=1MiB", "--namespace", "file="+s.dir+"/ns3,ana-group=2")...)
	s.target.Stdout, s.target.Stderr = s.targetLog, s.targetLog
	if err := s.target.Start(); err != nil {
		fatalf("%v", err)
	}
	s.targetDone = waitFor(s.target)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err = s.command(s.program, "target", "list", "--run-dir", s.runDir()); err == nil {
			if _, err = s.command(s.program, "target", "clear", "--run-dir", s.runDir()); err == nil {
				return
			}
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(s.targetLog.Name())
			fatalf("target does not start: %v\n%s", err, text)
		}
	}
}

// waitFor returns what is closed when the process has ended.
func waitFor(c *exec.Cmd) chan struct{} {
	done := make(chan struct{})
	go func() {
		_ = c.Wait() // how it ended is in c.ProcessState
		close(done)
	}()
	return done
}

// endTarget kills the target by a signal. It returns how many goroutines it had, if the
// signal is SIGQUIT.
func (s *soak) endTarget(signal syscall.Signal) int {
	s.worstOf = s.worstOf.max(s.measureTarget())
	if err := s.target.Process.Signal(signal); err != nil {
		fatalf("kill target: %v", err)
	}
	<-s.targetDone
	for _, l := range s.loads {
		l.disk.targetDied()
	}
	s.deaths++
	s.targetLog.Close()
	text, _ := os.ReadFile(s.targetLog.Name())
	return strings.Count("\n"+string(text), "\ngoroutine ")
}

// kill kills the server.
func (s *soak) kill() {
	s.fio.pause()
	s.worst = s.worst.max(s.measureServer())
	pid := s.serverPID()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		fatalf("kill server: %v", err)
	}
	s.kills++
	waitGone(pid)
}

func waitGone(pid int) {
	for end := time.Now().Add(10 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			fatalf("process %d does not end", pid)
		}
	}
}

// recover starts a server in place of the one that was killed.
func (s *soak) recover() {
	s.host("recover", "--all")
	s.fio.resume()
}

// stacks ends the server with SIGQUIT, and returns how many goroutines it had.
func (s *soak) stacks(name string, pid func() int) int {
	s.fio.pause()
	id := pid()
	if err := syscall.Kill(id, syscall.SIGQUIT); err != nil {
		fatalf("end server: %v", err)
	}
	waitGone(id)
	text, err := os.ReadFile(filepath.Join(s.runDir(), name, "log"))
	if err != nil {
		fatalf("%v", err)
	}
	dump := string(text)
	dump = dump[max(0, strings.LastIndex(dump, "SIGQUIT: quit")):]
	return strings.Count(dump, "\ngoroutine ")
}

// progress waits until each export has answered more requests.
func (s *soak) progress(after string) {
	began := time.Now()
	for _, l := range s.loads {
		want := l.requests.Load() + 100
		for l.requests.Load() < want {
			if time.Since(began) > progressLimit {
				fatalf("no I/O of export %d for %v after: %s", l.disk.id, progressLimit, after)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	s.fio.check()
}
