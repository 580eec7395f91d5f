package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Bounds on a server with a device that nobody uses. It keeps the controller alive
// and looks for requests that time out, and that is all. The first bound is the same
// on every machine. The second is not for an emulated CPU, whose speed depends on who
// else uses the machine: bench measures it there, on a clock of instructions.
const (
	idleSwitches = 50.0 // context switches a second
	idlePercent  = 0.5  // of a CPU
)

// TestIdle measures what a server costs that has nothing to do.
func TestIdle(t *testing.T) {
	const period = 10 * time.Second
	cpu, err := os.ReadFile("/proc/cpuinfo")
	emulated := err != nil || strings.Contains(string(cpu), "QEMU TCG")
	leavesNothing(t)
	run(t, "lab", "rxe", labMTU)
	run(t, "lab", "target", "size=64")
	t.Cleanup(func() { run(t, "lab", "clean") })
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"interrupt queues", []string{"-i2"}},
		{"poll queues", []string{"-i2", "-P2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, "ublk-nvmeof", append([]string{"connect", "-a", labAddr, "-n", labNQN, "--device-id=0", "--max-io-size=1MiB"}, tt.args...)...)
			defer run(t, "ublk-nvmeof", "disconnect", "-n", labNQN)
			// Some I/O, so that what it starts is seen to stop.
			run(t, "fio", "--name=load", "--filename=/dev/ublkb0", "--ioengine=io_uring", "--direct=1", "--iodepth=32",
				"--rw=randrw", "--bs=4k", "--size=1m")
			pid := listServers(t)[0].PID
			ticks, switches, start := cpuTicks(t, pid), contextSwitches(t, pid), time.Now()
			time.Sleep(period)
			seconds := time.Since(start).Seconds()
			percent := 100 * float64(cpuTicks(t, pid)-ticks) / userHZ / seconds
			rate := float64(contextSwitches(t, pid)-switches) / seconds
			t.Logf("%.1f %% of a CPU, %.0f context switches a second; resident with 2 queues of 128 requests of 1 MiB: %s", percent, rate, resident(t, pid))
			if !emulated && percent > idlePercent {
				t.Errorf("an idle server takes %.1f %% of a CPU, want at most %.1f", percent, idlePercent)
			}
			if rate > idleSwitches {
				t.Errorf("an idle server does %.0f context switches a second, want at most %.0f", rate, idleSwitches)
			}
		})
	}
}

// userHZ is how many ticks a second has in /proc, on every machine.
const userHZ = 100

// cpuTicks is the CPU time that a process has used, in ticks.
func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// pid (name) state … utime and stime are the 14th and 15th.
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	var user, system int
	if _, err := fmt.Sscan(strings.Join(fields[11:13], " "), &user, &system); err != nil {
		t.Fatalf("/proc/%d/stat: %v", pid, err)
	}
	return user + system
}

// contextSwitches is how often the threads of a process have waited. One that ends
// takes its number with it; those of a server do not.
func contextSwitches(t *testing.T, pid int) (n int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of process %d: %v", pid, err)
	}
	for _, file := range files {
		v, err := strconv.Atoi(statusField(t, file, "voluntary_ctxt_switches"))
		if err != nil {
			t.Fatal(err)
		}
		n += v
	}
	return n
}

func resident(t *testing.T, pid int) string {
	t.Helper()
	return statusField(t, fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
}

// statusField is a line of a status file in /proc.
func statusField(t *testing.T, file, name string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n"+name+":")
	if !ok {
		t.Fatalf("%s: no %s", file, name)
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}
