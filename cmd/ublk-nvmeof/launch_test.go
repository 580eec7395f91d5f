package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
	"ublk-nvmeof/internal/testenv"
)

// A server that dies without a report is said to have died of its exit code or
// signal, with the last line of its log.
func TestLaunchSaysHowAServerDied(t *testing.T) {
	const killed = "kill -KILL $$" // the rest depends on the machine's memory
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("first\nlevel=ERROR msg=\"the last\"\n\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	logs := `echo '{"log": "` + log + `"}' >&3; `
	for script, want := range map[string]string{
		"exit 3":                     "it ended with exit code 3 and reported nothing",
		logs + "exit 0":              `it ended with exit code 0 and reported nothing; its log ends with: level=ERROR msg="the last"`,
		logs + "kill -SEGV $$":       `it was killed by SIGSEGV; its log ends with: level=ERROR msg="the last"`,
		killed:                       "it was killed by SIGKILL",
		`echo '{"log": "/x"}' >&3; `: "it ended with exit code 0 and reported nothing",
	} {
		path, args := shell(script)
		_, err := launch(t.Context(), path, args, nil, time.Minute, silent)
		if err == nil || !strings.HasPrefix(err.Error(), "the server died: "+want) ||
			script != killed && err.Error() != "the server died: "+want {
			t.Errorf("%s: %v, want %s", script, err, want)
		}
	}
	path, args := shell(logs + `echo '{"status": {"name": "ctrl9"}}' >&3`)
	if s, err := launch(t.Context(), path, args, nil, time.Minute, silent); err != nil || s.Name != "ctrl9" {
		t.Errorf("%+v, %v", s, err)
	}
}

// A server that the kernel has killed for its memory is told from one that
// somebody has killed.
func TestObituaryNamesMemory(t *testing.T) {
	ended := func(script string) *os.ProcessState {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", script)
		_ = cmd.Run() // it dies
		return cmd.ProcessState
	}
	for _, tt := range []struct {
		script string
		memory memory
		want   string
	}{
		{"kill -KILL $$", memoryLeft, "it was killed by SIGKILL"},
		{"kill -KILL $$", memoryUnknown, "it was killed by SIGKILL, perhaps because the machine or its control group was out of memory; see the kernel's log"},
		{"kill -KILL $$", memoryRanOut, "it was killed by SIGKILL, and the kernel has killed a process meanwhile because memory ran out; a smaller --queue-size, --max-io-size or --nr-io-queues needs less"},
		{"kill -TERM $$", memoryRanOut, "it was killed by SIGTERM"},
		{"exit 2", memoryRanOut, "it ended with exit code 2 and reported nothing"},
	} {
		if got := obituary(ended(tt.script), "", tt.memory); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.script, got, tt.want)
		}
	}
}

func TestLastLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	long := strings.Repeat("x", 9000)
	for text, want := range map[string]string{"": "", "\n\n": "", "one": "one", "one\ntwo\n": "two", "one\n" + long: long[:4096]} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastLine(path); got != want {
			t.Errorf("%.20q of %d bytes, want %.20q", got, len(got), want)
		}
	}
}

// session runs a shell with a script as the leader of a session, and returns it
// once it has said so.
func session(t *testing.T, script string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/bash", append([]string{"-c", script + "\necho up $?; sleep 600"}, args...)...)
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for s := bufio.NewScanner(out); s.Scan(); {
		if code, ok := strings.CutPrefix(s.Text(), "up "); ok {
			if code != "0" {
				t.Fatalf("exit code %s", code)
			}
			return cmd
		}
	}
	t.Fatal("the session ended")
	return nil
}

// Servers in the background have nothing of the session that started them, and
// live on when it ends and when somebody sends them SIGHUP, with a word in the log.
func TestServersOutliveTheirSession(t *testing.T) {
	dir := runDir(t)
	inherited := filepath.Join(dir, "inherited")
	run := func(args ...string) (string, exit.Code) {
		out, errs, code := execProgram(t, append([]string{"--run-dir", dir}, args...)...)
		return out + errs, code
	}
	s := session(t, `exec 9>"$1" 8>&9
cd "$3" &&
"$0" --run-dir "$3" target --background -a "$2" --provider roce -n nqn.a --namespace ram=1MiB 2>"$1.errors" &&
"$0" --run-dir "$3" connect -a "$2" -n nqn.a -i 1 --provider roce --frontend nbd-socket 2>>"$1.errors"`, self(), inherited, loopback(), dir)
	defer run("target", "stop")
	defer run("disconnect", "--force", "-n", "nqn.a")
	pids := map[string]int{}
	var l struct{ Controllers []control.Status }
	var targets struct{ Targets []targetserver.Status }
	for text, v := range map[string]any{"list": &l, "target list": &targets} {
		out, code := run(append(strings.Fields(text), "-o", "json")...)
		if err := json.Unmarshal([]byte(out), v); err != nil || code != exit.OK {
			t.Fatalf("%v, exit code %d, %s", err, code, out)
		}
	}
	if len(l.Controllers) != 1 || len(targets.Targets) != 1 {
		t.Fatalf("%+v %+v", l, targets)
	}
	pids["ctrl0"], pids["target0"] = l.Controllers[0].PID, targets.Targets[0].PID

	syscall.Kill(-s.Process.Pid, syscall.SIGHUP)
	syscall.Kill(-s.Process.Pid, syscall.SIGKILL)
	s.Wait()
	for name, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		fds, err := os.ReadDir(proc + "/fd")
		if err != nil {
			t.Fatalf("%s is dead: %v", name, err)
		}
		for _, fd := range fds {
			if to, _ := os.Readlink(proc + "/fd/" + fd.Name()); strings.HasPrefix(to, inherited) {
				t.Errorf("%s has the session's %s as %s", name, to, fd.Name())
			}
		}
		if cwd, err := os.Readlink(proc + "/cwd"); err != nil || cwd != "/" {
			t.Errorf("%s is in %s, %v", name, cwd, err)
		}
		if in, err := os.Readlink(proc + "/fd/0"); err != nil || in != "/dev/null" {
			t.Errorf("%s reads %s, %v", name, in, err)
		}
		if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		log := filepath.Join(dir, name, "log")
		for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			text, err := os.ReadFile(log)
			if err == nil && strings.Contains(string(text), "SIGHUP is ignored") {
				break
			}
			if time.Since(began) > 20*time.Second {
				t.Fatalf("%s says nothing of SIGHUP: %v\n%s", name, err, text)
			}
		}
	}
	if out, code := run("list"); code != exit.OK || !strings.Contains(out, "live") {
		t.Errorf("exit code %d, %s", code, out)
	}
}

// A command says what its server waits for, and up to when, if that takes long. The wait
// does not count for the time limit of the command.
func TestLaunchSaysWhatAServerWaitsFor(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	path, args := shell(`echo '{"name": "ctrl7", "log": "/x"}' >&3; echo '{"wait": {"for": "waits for nobody", "seconds": 9}}' >&3; echo '{"wait": {}}' >&3; ` +
		`echo '{"wait": {"for": "waits for a friend", "seconds": 90}}' >&3; ` +
		`read word <` + fifo + `; echo '{"status": {"name": "ctrl7"}}' >&3`)
	var said []string
	// The server answers after the limit that it would have without the wait.
	const limit = 5 * time.Second
	late := time.After(limit)
	s, err := launch(t.Context(), path, args, nil, limit-undoTime, func(text string) {
		said = append(said, text)
		<-late
		if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
			t.Error(err)
		}
	})
	if err != nil || s.Name != "ctrl7" || !slices.Equal(said, []string{"ctrl7 waits for a friend, up to 1m30s"}) {
		t.Errorf("%+v, %v; said %q", s, err, said)
	}
}

// TestAbandonedReports checks that a server learns that its command has been killed, also if the
// command had not read all reports: the kernel then reports a reset, and not the end.
func TestAbandonedReports(t *testing.T) {
	for _, unread := range []bool{false, true} {
		own, child, err := socketPair()
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Dup(int(child.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := newReporter(fd)
		if err != nil {
			t.Fatal(err)
		}
		abandoned := r.abandoned()
		if unread {
			r.waits(server.Wait{For: "a friend", Seconds: 9})
		}
		if err := own.Close(); err != nil {
			t.Fatal(err)
		}
		testenv.Receive(t, abandoned, "the news that the command has ended")
		_ = r.close()
	}
}
