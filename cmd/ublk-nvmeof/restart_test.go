package main

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
)

// Recover --all starts servers at the same time: one whose target still works for the
// dead server does not keep the others waiting. With --timeout it gives up in time, and
// can be tried again.
func TestRecoverAll(t *testing.T) {
	t.Parallel()
	nqns := []string{"nqn.2026-01.org.example:a", "nqn.2026-01.org.example:b"}
	s := newSite(t, nqns...)
	var disks []*disk
	var dead []state.Record
	for _, nqn := range nqns {
		d := newDisk("nothing")
		s.put(nqn, d)
		disks = append(disks, d)
		r := s.connect(nqn)
		c := s.client(r)
		held := d.hold("old")
		go c.do(nbdWrite, 0, block("old"), nbdPatience) // its server will not answer
		testenv.Receive(t, held, "the write at the target")
		s.kill(r)
		dead = append(dead, r)
	}
	_, stderr, code := s.program("recover", "--timeout", "1s", dead[0].Name)
	if code != exit.Timeout || !strings.Contains(stderr, "still has a controller of an earlier server") {
		t.Errorf("exit code %d, %s", code, stderr)
	}

	type result struct {
		stdout, stderr string
		code           exit.Code
	}
	done := make(chan result, 1)
	go func() {
		stdout, stderr, code := s.program("recover", "--all")
		done <- result{stdout, stderr, code}
	}()
	eventually(t, "both servers run", func() bool { return s.record(nqns[0]).Alive && s.record(nqns[1]).Alive })
	for _, d := range disks {
		d.release()
	}
	got := testenv.Receive(t, done, "the end of recover")
	if got.code != exit.OK || strings.Contains(got.stderr, "level=") { // what is logged is in the server's log
		t.Errorf("exit code %d, %s", got.code, got.stderr)
	}
	for _, nqn := range nqns {
		if !strings.Contains(got.stdout, "connected "+nqn) {
			t.Errorf("%s is not reported: %s", nqn, got.stdout)
		}
	}
}

// A server that is named twice, by itself and by its subsystem, is upgraded once, and an
// NQN names all its servers.
func TestRunningAreNamedOnce(t *testing.T) {
	dir := runDir(t)
	p, _ := startProcess(t)
	for range 2 {
		record(t, dir, "nqn.a", p, state.Device{ID: 3, NSID: 1})
	}
	got, err := running(state.Dir(dir), []string{"ctrl1", "nqn.a", "ctrl0"})
	if err != nil || len(got) != 2 || got[0].Name != "ctrl1" || got[1].Name != "ctrl0" {
		t.Errorf("%+v, %v", got, err)
	}
}

// A server that is stopped is waited for as long as disconnect says, with its process
// and the way out.
func TestDisconnectSaysWhatItWaitsFor(t *testing.T) {
	t.Parallel()
	defer func(d time.Duration) { orderlyTime = d }(orderlyTime)
	orderlyTime = sayAfter + time.Second
	const nqn = "nqn.2026-01.org.example:stopped"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("nothing"))
	r := s.connect(nqn)
	if err := syscall.Kill(r.Process.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server is stopped", r.Process.Stopped)
	stdout, stderr, code := program(t, "disconnect", "--run-dir", s.dir, nqn)
	who := fmt.Sprintf("process %d (which is stopped; SIGCONT continues it)", r.Process.PID)
	want := fmt.Sprintf("ublk-nvmeof: disconnect: ctrl0 waits up to 3s until %s has ended its devices; --force does not wait\n"+
		"ublk-nvmeof: disconnect: ctrl0: %s did not answer within 3s; --force kills it\n", who, who)
	if code != exit.Timeout || stderr != want || stdout != "NQN:"+nqn+" disconnected 0 controller(s)\n" {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
	if stdout, stderr, code := program(t, "disconnect", "--run-dir", s.dir, "--force", nqn); code != exit.OK || stderr != "" {
		t.Errorf("by force: exit code %d, %q, %q", code, stdout, stderr)
	}
}
