package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// A server and a target with two ports: the target holds a write, its port goes away, and the
// application writes newer data to the same block over the other port. Then the target
// finishes the old write.

// late is such a target.
type late struct {
	*site
	nqn    string
	disk   *disk
	second netip.Addr     // of the port that stays
	other  *roce.Provider // of that port
}

func newLate(t *testing.T, nqn string) *late {
	t.Helper()
	l := &late{site: newSite(t, nqn), nqn: nqn, disk: newDisk("nothing")}
	l.put(nqn, l.disk)
	l.second = anotherLoopback()
	p, err := roce.New(roce.Config{Addrs: []netip.Addr{l.second}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.site.close() // first, because it uses the provider
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	l.other = p
	if _, err := l.target.AddPorts(target.PortConfig{Provider: p, Addr: netip.AddrPortFrom(l.second, 4420)}); err != nil {
		t.Fatal(err)
	}
	return l
}

// cut takes the first port away.
func (l *late) cut() {
	l.t.Helper()
	for _, p := range l.target.Ports() {
		if p.Addr().Addr() == l.addr {
			if err := p.Close(); err != nil {
				l.t.Fatal(err)
			}
		}
	}
}

// mend opens the first port again.
func (l *late) mend() {
	l.t.Helper()
	if _, err := l.target.AddPorts(target.PortConfig{Provider: l.provider, Addr: netip.AddrPortFrom(l.addr, 4420)}); err != nil {
		l.t.Fatal(err)
	}
}

// prefer waits until both paths are there and know each other's controllers, and makes the first
// one preferred.
func (l *late) prefer(r state.Record) {
	l.t.Helper()
	eventually(l.t, "both paths are live", func() bool {
		ctx, cancel := context.WithTimeout(l.t.Context(), 10*time.Second)
		defer cancel()
		s, err := control.NewClient(r.Socket()).Status(ctx)
		return err == nil && len(s.Paths) == 2 && s.Paths[0].State == "live" && s.Paths[1].State == "live" &&
			(s.Fence == "none" || len(s.Paths[0].Vouched) == 1 && len(s.Paths[1].Vouched) == 1)
	})
	if err := l.run("policy", r.Name, "--policy", "preferred", "--preferred", l.addr.String()); err != nil {
		l.t.Fatal(err)
	}
}

// round is one late write. The server is killed between the loss of the path and the newer
// write, and recovered; or it serves on, and answers the write. It returns what is on the disk in
// the end.
func (l *late) round(r state.Record, n int, killed bool, patience time.Duration) string {
	l.t.Helper()
	before, after := fmt.Sprintf("old %d", n), fmt.Sprintf("new %d", n)
	held := l.disk.hold(before)
	lost := make(chan error, 1)
	c := l.client(r)
	go func() { lost <- c.do(nbdWrite, 0, block(before), nbdPatience) }()
	testenv.Receive(l.t, held, "the write at the target")
	l.cut()
	written := make(chan error, 1)
	socket := socketOf(l.t, r)
	newer := func() {
		c, err := dialNBD("unix", socket, "1")
		if err != nil {
			written <- err
			return
		}
		defer c.close()
		written <- c.write(after)
	}
	if killed {
		l.kill(r)
		testenv.Receive(l.t, lost, "the end of the connection")
		go func() {
			if err := l.run("recover", r.Name); err != nil {
				written <- err
				return
			}
			newer()
		}()
	} else {
		go func() { // the order of writes that are in flight together is open
			if err := <-lost; err != nil {
				written <- err
				return
			}
			newer()
		}()
	}
	var err error
	select {
	case err = <-written: // while the target works on the old write
		l.disk.release()
	case <-time.After(patience):
		l.disk.release()
		err = testenv.Receive(l.t, written, "the answer to the newer write")
	}
	if err != nil {
		l.t.Fatal(err)
	}
	eventually(l.t, "the target has finished the old write", func() bool {
		l.disk.mu.Lock()
		defer l.disk.mu.Unlock()
		return l.disk.finished
	})
	return strings.TrimRight(l.disk.text(len(after)), "\x00")
}

// TestLateWrite checks that a write that the target of a lost path finishes late does not
// overwrite a newer one, also if the server is killed in between. Without the fence it does: the
// test can fail.
func TestLateWrite(t *testing.T) {
	for name, c := range map[string]struct {
		fence  string
		killed bool
		want   string
		rounds int
	}{
		"fence":                     {"auto", false, "new", testenv.Rounds(2)},
		"fence, killed":             {"auto", true, "new", testenv.Rounds(2)},
		"without the fence":         {"none", false, "old", 1},
		"without the fence, killed": {"none", true, "old", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nqn := "nqn.2026-01.org.example:" + strings.ReplaceAll(strings.ReplaceAll(name, ",", ""), " ", "-")
			l := newLate(t, nqn)
			r := l.connect(nqn, "--path", l.second.String(), "--fence", c.fence)
			l.prefer(r)
			for n := range c.rounds {
				// The second one is longer than a target may take to end a controller.
				patience := []time.Duration{0, 12 * time.Second, 700 * time.Millisecond, 2 * time.Second}[n%4]
				if c.fence == "none" {
					patience = nbdPatience
				}
				if got := l.round(r, n, c.killed, patience); got != fmt.Sprint(c.want, " ", n) {
					t.Fatalf("round %d: the disk has %q, want the %s write", n, got, c.want)
				}
				l.mend()
				r = l.record(nqn)
				l.prefer(r)
			}
		})
	}
}

// TestAllPathsAway checks that requests fail after --fast-io-fail-tmo when all paths are away, that they
// work again over the first path that is back, with another controller id, and that the server gives
// up after --ctrl-loss-tmo and says how to go on.
func TestAllPathsAway(t *testing.T) {
	t.Parallel()
	const nqn = "nqn.2026-01.org.example:away"
	l := newLate(t, nqn)
	status := func() control.Status {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		s, err := control.NewClient(l.record(nqn).Socket()).Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	cut := func() {
		for _, p := range l.target.Ports() {
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	mendSecond := func() {
		if _, err := l.target.AddPorts(target.PortConfig{Provider: l.other, Addr: netip.AddrPortFrom(l.second, 4420)}); err != nil {
			t.Fatal(err)
		}
	}
	r := l.connect(nqn, "--path", l.second.String(), "--fast-io-fail-tmo", "1", "--ctrl-loss-tmo", "8")
	c := l.client(r)
	if err := c.write("before"); err != nil {
		t.Fatal(err)
	}
	ids := []uint16{status().Paths[0].CNTLID, status().Paths[1].CNTLID}
	cut()
	if err := c.do(nbdWrite, 0, block("lost"), nbdPatience); err == nil {
		t.Error("a write without a path succeeded")
	}
	mendSecond()
	eventually(t, "requests work over the second path", func() bool { return l.client(r).write("after") == nil })
	s := status()
	if s.State != "live" || s.Paths[0].State != "connecting" || s.Paths[1].State != "live" || slices.Contains(ids, s.Paths[1].CNTLID) {
		t.Errorf("%+v, the controllers were %v", s.Paths, ids)
	}
	l.mend()
	eventually(t, "both paths are live", func() bool { return status().Paths[0].State == "live" })
	if got, err := l.client(r).read(5); got != "after" || err != nil {
		t.Errorf("%q, %v", got, err)
	}

	cut()
	eventually(t, "the server gives up", func() bool { return status().State == "dead" })
	if err := l.client(r).do(nbdWrite, 0, block("lost"), nbdPatience); err == nil {
		t.Error("a write of a server that has given up succeeded")
	}
	l.mend()
	mendSecond()
	if _, stderr, code := l.program(l.connectArgs(nqn)...); code != exit.AlreadyServed || !strings.Contains(stderr, "disconnect "+r.Name+" ends its devices, and then connect works") {
		t.Errorf("connect: exit code %d, %s", code, stderr)
	}
	if err := errors.Join(l.run("disconnect", "--force", r.Name), l.run(l.connectArgs(nqn, "--path", l.second.String())...)); err != nil {
		t.Fatal(err)
	}
	if got, err := l.client(l.record(nqn)).read(5); got != "after" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
