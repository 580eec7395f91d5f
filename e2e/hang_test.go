package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// explainHang tells, once a test has run for so long, what the servers and fio are
// doing. The servers do not survive it.
func explainHang(t *testing.T, after time.Duration) {
	timer := time.AfterFunc(after, func() {
		fmt.Fprintf(os.Stderr, "%s has run for %v.\n", t.Name(), after)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, "ublk-nvmeof", "list", "-v").CombinedOutput()
		fmt.Fprintf(os.Stderr, "list: %v\n%s", err, out)
		var servers []int
		for pid, name := range processes(t) {
			switch name {
			case "ublk-nvmeof":
				servers = append(servers, pid)
			case "fio":
			default:
				continue
			}
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
			for _, task := range tasks {
				status, _ := os.ReadFile(filepath.Join(task, "stat"))
				stack, _ := os.ReadFile(filepath.Join(task, "stack"))
				fmt.Fprintf(os.Stderr, "thread %s\n%s", lastLines(string(status), 1), stack)
			}
		}
		for _, name := range []string{"/sys/block/*/inflight", "/sys/kernel/debug/block/ublkb*/hctx*/busy"} {
			files, _ := filepath.Glob(name)
			for _, file := range files {
				text, _ := os.ReadFile(file)
				fmt.Fprintf(os.Stderr, "%s: %s\n", file, strings.TrimSpace(string(text)))
			}
		}
		for _, pid := range servers {
			_ = unix.Kill(pid, unix.SIGQUIT) // Go's runtime writes its stacks to the log
		}
		time.Sleep(2 * time.Second)
		fmt.Fprint(os.Stderr, serverLogs(400))
	})
	t.Cleanup(func() { timer.Stop() })
}

// serverLogs are the ends of the logs of the servers that are there.
func serverLogs(lines int) string {
	files, _ := filepath.Glob("/run/ublk-nvmeof/*/log")
	var b strings.Builder
	for _, file := range files {
		text, _ := os.ReadFile(file)
		fmt.Fprintf(&b, "%s:\n%s", file, lastLines(string(text), lines))
	}
	return b.String()
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n") + "\n"
}
