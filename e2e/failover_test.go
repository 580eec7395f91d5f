package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// The load of failover. It leaves the first 32 MiB of the device to others.
const (
	loadBlock   = 4096
	loadReaders = 4
	loadWriters = 4
	loadReads   = 32 << 20 // offset of the blocks that are read
	loadWrites  = 48 << 20 // offset of the blocks that are written
	loadSize    = 16 << 20 // of either
	writeEvery  = 5 * time.Millisecond
	loadBefore  = 500 * time.Millisecond // time before the loss, and after all is over
)

// ioTime is how long a request took.
type ioTime struct {
	began, ended time.Time
	write        bool
	err          error
}

func (i ioTime) took() time.Duration { return i.ended.Sub(i.began) }

// deviceLoad reads and writes a device until it is stopped. Readers read one block after the
// other, and each writer writes its own block, so that writes are in flight at any time. Further
// writes, each of a block of its own, begin at a fixed rate, whether earlier ones have ended or not.
type deviceLoad struct {
	file *os.File
	page []byte // what is written
	stop chan struct{}
	all  sync.WaitGroup

	mu    sync.Mutex
	times []ioTime
}

func startLoad(ts *testscript.TestScript, device string) *deviceLoad {
	file, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	ts.Check(err)
	l := &deviceLoad{file: file, page: alignedPage(ts), stop: make(chan struct{})}
	for range loadReaders {
		page := alignedPage(ts)
		l.all.Go(func() { l.read(page) })
	}
	for i := range int64(loadWriters) {
		l.all.Go(func() { l.rewrite(loadWrites + i*loadBlock) })
	}
	l.all.Go(l.write)
	return l
}

func alignedPage(ts *testscript.TestScript) []byte {
	page, err := unix.Mmap(-1, 0, loadBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	ts.Check(err)
	return page
}

func (l *deviceLoad) stopped() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

func (l *deviceLoad) read(page []byte) {
	for !l.stopped() {
		at := loadReads + rand.Int64N(loadSize/loadBlock)*loadBlock
		l.time(false, func() error {
			_, err := l.file.ReadAt(page, at)
			return err
		})
	}
}

func (l *deviceLoad) rewrite(at int64) {
	for !l.stopped() {
		l.writeAt(at)
	}
}

func (l *deviceLoad) write() {
	tick := time.NewTicker(writeEvery)
	defer tick.Stop()
	for at := int64(loadWrites + loadWriters*loadBlock); at < loadWrites+loadSize; at += loadBlock {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		l.all.Go(func() { l.writeAt(at) })
	}
}

func (l *deviceLoad) writeAt(at int64) {
	l.time(true, func() error {
		_, err := l.file.WriteAt(l.page, at)
		return err
	})
}

func (l *deviceLoad) time(write bool, do func() error) {
	began := time.Now()
	err := do()
	t := ioTime{began, time.Now(), write, err}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.times = append(l.times, t)
}

// end stops the load and returns how long its requests took.
func (l *deviceLoad) end(ts *testscript.TestScript) []ioTime {
	close(l.stop)
	l.all.Wait()
	ts.Check(l.file.Close())
	return l.times
}

// loss is what the log of the server says of the last loss of a path.
type loss struct {
	noticed time.Time
	ended   string // what ended the old controller; empty: it may exist
}

var (
	lossLine = regexp.MustCompile(`(?m)^time=(\S+) .*msg="association lost"`)
	endLine  = regexp.MustCompile(`(?m)^time=.*msg="old controller has ended" .*(after=.*)$`)
)

// findLoss reads the losses since some time from the logs of the servers.
func findLoss(ts *testscript.TestScript, since time.Time) (loss, bool) {
	files, err := filepath.Glob("/run/ublk-nvmeof/*/log")
	ts.Check(err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		ts.Check(err)
		found := lossLine.FindAllSubmatchIndex(text, -1)
		if len(found) == 0 {
			continue
		}
		last := found[len(found)-1]
		at, err := time.Parse(time.RFC3339Nano, string(text[last[2]:last[3]]))
		ts.Check(err)
		if at.Before(since.Truncate(time.Millisecond)) {
			continue
		}
		l := loss{noticed: at}
		if end := endLine.FindSubmatch(text[last[1]:]); end != nil {
			l.ended = string(end[1])
		}
		return l, true
	}
	return loss{}, false
}

// failover LIMIT HELD DEVICE command [argument …]: the command takes away one of several paths,
// and the server notices it at once. Meanwhile 4 KiB reads go to the device, and writes, never two
// of one block at a time. No request fails. None that ends after the loss was noticed takes longer
// than LIMIT, except for writes that were in flight at that moment: these take HELD at most.
func failover(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 {
		ts.Fatalf("usage: failover limit held device command [argument ...]")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	held, err := time.ParseDuration(args[1])
	ts.Check(err)
	load := startLoad(ts, args[2])
	time.Sleep(loadBefore)
	began := time.Now()
	ran := ts.Exec(args[3], args[4:]...)
	var lost loss
	for end := began.Add(held + 20*time.Second); lost.ended == "" && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		lost, _ = findLoss(ts, began)
	}
	time.Sleep(loadBefore)
	times := load.end(ts)
	ts.Check(ran)
	if lost.ended == "" {
		ts.Fatalf("no path was lost, or its old controller has not ended: %+v", lost)
	}
	f := sortTimes(times, lost.noticed)
	what := strings.Join(args[3:], " ")
	fmt.Fprintf(os.Stderr, "    %s: noticed after %v; reads at most %v (%v before), other writes %v (%v), %d writes in flight %v; %s\n", what,
		lost.noticed.Sub(began).Round(time.Millisecond), f.read, f.readBefore, f.write, f.writeBefore, f.inFlight, f.held, lost.ended)
	switch {
	case f.err != nil:
		ts.Fatalf("%s: %v", what, f.err)
	case f.inFlight == 0:
		ts.Fatalf("%s: no write was in flight", what)
	case max(f.read, f.write) > limit || f.held > held:
		ts.Fatalf("%s: want at most %v, and %v for writes in flight", what, limit, held)
	}
}

// failoverTimes are the longest times of requests.
type failoverTimes struct {
	readBefore, writeBefore time.Duration // that ended before the loss was noticed
	read, write             time.Duration // of others
	held                    time.Duration // of writes in flight when the loss was noticed
	inFlight                int           // number of these
	err                     error
}

func sortTimes(times []ioTime, noticed time.Time) (f failoverTimes) {
	for _, t := range times {
		longest := &f.read
		switch {
		case t.ended.Before(noticed) && t.write:
			longest = &f.writeBefore
		case t.ended.Before(noticed):
			longest = &f.readBefore
		case t.write && !t.began.After(noticed.Add(time.Millisecond)): // the log has milliseconds
			longest = &f.held
			f.inFlight++
		case t.write:
			longest = &f.write
		}
		*longest = max(*longest, t.took().Round(100*time.Microsecond))
		if t.err != nil {
			f.err = t.err
		}
	}
	return f
}

// failoverLimits are how long requests may take for failover that do not wait for an old
// controller, and those that wait for one of whose loss the target knows. Only on a clock of
// instructions they do not depend on who else uses the machine.
func failoverLimits() (goesOn, held string) {
	if os.Getenv("UN_ICOUNT") != "" {
		return "100ms", "1s"
	}
	return "2s", "5s"
}

// holdClock keeps the clock from leaping, if it is one of instructions: when all CPUs are idle,
// it leaps to the next timer at once, so that a wait for the host of the VM can last minutes.
func holdClock() {
	if os.Getenv("UN_ICOUNT") == "" {
		return
	}
	go func() {
		runtime.LockOSThread()
		leap := unix.NsecToTimespec(int64(100 * time.Microsecond))
		for {
			_ = unix.Nanosleep(&leap, nil)
		}
	}()
}

// shares LOW-HIGH[,LOW-HIGH…] command [argument …]: of the reads and writes that arrive at the
// target while the command runs, so many per cent come over each path, in the order of list. The
// target counts them by controller.
func shares(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: shares low-high[,low-high...] command [argument ...]")
	}
	ts.Check(ts.Exec("lab", "count"))
	ts.Check(ts.Exec(args[1], args[2:]...))
	counts, total := map[int]int{}, 0
	out, err := exec.Command("lab", "controllers").Output()
	ts.Check(err)
	for line := range strings.Lines(string(out)) {
		var cntlid, opcode, n int
		_, err := fmt.Sscanf(line, "%d %x %d", &cntlid, &opcode, &n)
		ts.Check(err)
		if opcode == 1 || opcode == 2 {
			counts[cntlid] += n
			total += n
		}
	}
	paths, wanted := listPaths(ts), strings.Split(args[0], ",")
	if total == 0 || len(paths) != len(wanted) {
		ts.Fatalf("%d requests over %d paths:\n%s", total, len(paths), out)
	}
	for i, p := range paths {
		var low, high int
		_, err := fmt.Sscanf(wanted[i], "%d-%d", &low, &high)
		ts.Check(err)
		percent := 100 * counts[p.CNTLID] / total
		ts.Logf("%s:%s: %d%% of %d", p.TrAddr, p.TrSvcID, percent, total)
		if percent < low || percent > high {
			ts.Fatalf("%s:%s has %d%% of the requests, want %s", p.TrAddr, p.TrSvcID, percent, wanted[i])
		}
	}
}

// listedPath is what "list -o json" says of a path, as far as it matters here.
type listedPath struct {
	TrAddr  string `json:"traddr"`
	TrSvcID string `json:"trsvcid"`
	CNTLID  int    `json:"cntlid"`
}

// listPaths returns the paths of the only server.
func listPaths(ts *testscript.TestScript) []listedPath {
	out, err := exec.Command("ublk-nvmeof", "list", "-o", "json").Output()
	ts.Check(err)
	var list struct {
		Controllers []struct {
			Paths []listedPath `json:"paths"`
		} `json:"controllers"`
	}
	ts.Check(json.Unmarshal(out, &list))
	if len(list.Controllers) != 1 {
		ts.Fatalf("%d servers", len(list.Controllers))
	}
	return list.Controllers[0].Paths
}

func TestSortTimes(t *testing.T) {
	at := func(ms int) time.Time { return time.Time{}.Add(time.Duration(ms) * time.Millisecond) }
	const noticed = 110
	f := sortTimes([]ioTime{
		{at(0), at(7), false, nil},
		{at(90), at(98), true, nil},
		{at(99), at(120), false, nil},
		{at(130), at(155), false, nil},
		{at(95), at(105), true, nil},     // ended before anything was noticed
		{at(108), at(400), true, nil},    // held
		{at(111), at(141), true, nil},    // may have been in flight, in the milliseconds of the log
		{at(112), at(140), true, nil},    // not in flight
		{at(500), at(501), true, io.EOF}, // fails
	}, at(noticed))
	want := failoverTimes{
		readBefore: 7 * time.Millisecond, writeBefore: 10 * time.Millisecond, read: 25 * time.Millisecond,
		write: 28 * time.Millisecond, held: 292 * time.Millisecond, inFlight: 2, err: io.EOF,
	}
	if f != want {
		t.Errorf("%+v, want %+v", f, want)
	}
}
