package main

import (
	"maps"
	"os"
	"runtime"
	"testing"
	"time"
)

func TestParseCPUUse(t *testing.T) {
	const stat = "cpu  138 0 1610 4275 25 0 192 0 0 0\ncpu0 69 0 800 2000 20 0 90 0 0 0\nintr 5 0\nctxt 4711\nbtime 1\n"
	got, err := parseCPUUse([]byte(stat))
	if err != nil || got.idle != 43*time.Second || got.switches != 4711 {
		t.Errorf("parseCPUUse = %+v, %v, want 43s idle, 4711 switches", got, err)
	}
	for _, bad := range []string{"", "cpu 1 2 3\nctxt 5\n", "cpu  1 2 3 x 5 6\nctxt 5\n", "ctxt 5\n"} {
		if got, err := parseCPUUse([]byte(bad)); err == nil {
			t.Errorf("parseCPUUse(%q) = %+v, want an error", bad, got)
		}
	}
}

func TestBusy(t *testing.T) {
	start := time.Now()
	from := cpuUse{at: start, idle: 10 * time.Second}
	to := cpuUse{at: start.Add(2 * time.Second), idle: 13 * time.Second}
	if got := busy(from, to, 4); got != 5*time.Second {
		t.Errorf("busy = %v, want 5s: 4 CPUs for 2s, 3s of it idle", got)
	}
}

func TestTaskUseOfThisProcess(t *testing.T) {
	before, err := readTaskUse(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if len(before.threads) == 0 {
		t.Fatal("no threads")
	}
	for {
		now, err := readTaskUse(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now.run > before.run {
			break // or the test's deadline ends it
		}
		runtime.Gosched()
	}
	if rss, err := residentMemory(os.Getpid()); err != nil || rss < 1<<20 {
		t.Errorf("resident memory %d, %v: less than the test itself", rss, err)
	}
	if use, err := readTaskUse(0); err != nil || use.run != 0 || use.threads != nil {
		t.Errorf("no process: %+v, %v", use, err)
	}
	if _, err := readTaskUse(1 << 30); err == nil {
		t.Error("a process that is not there has used something")
	}
}

func TestParseTransferred(t *testing.T) {
	const stat = "   20792        0   166336    80476        3        0       24        0        0     2972    80476 0 0 0 0 0 0\n"
	if got, err := parseTransferred([]byte(stat)); err != nil || got != (166336+24)*512 {
		t.Errorf("parseTransferred = %d, %v, want %d", got, err, (166336+24)*512)
	}
	for _, bad := range []string{"", "1 2 3", "1 2 x 4 5 6 7"} {
		if got, err := parseTransferred([]byte(bad)); err == nil {
			t.Errorf("parseTransferred(%q) = %d, want an error", bad, got)
		}
	}
}

const hist = `# event histogram
#
# trigger info: hist:keys=common_pid,id:vals=hitcount:sort=hitcount:size=4096 [active]
#

{ common_pid:        701, id:        202 } hitcount:          3
{ common_pid:        702, id:        426 } hitcount:       1500
{ common_pid:        703, id:        426 } hitcount:        500
{ common_pid:        900, id:        426 } hitcount:       7777

Totals:
    Hits: 9780
    Entries: 4
    Dropped: 0
`

func TestParseSyscalls(t *testing.T) {
	got, err := parseSyscalls([]byte(hist), []int{701, 702, 703})
	if want := map[int]uint64{202: 3, 426: 2000}; err != nil || !maps.Equal(got, want) {
		t.Errorf("parseSyscalls = %v, %v, want %v", got, err, want)
	}
	dropped := []byte(hist[:len(hist)-2] + "12\n")
	if got, err := parseSyscalls(dropped, []int{702}); err == nil {
		t.Errorf("parseSyscalls with dropped hits = %v, want an error", got)
	}
}
