package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/internal/testenv"
)

// apart is a subsystem that two target processes serve, each with controller ids of its own, as
// in a cluster of gateways that know nothing of each other. A file is their disk.
type apart struct {
	*twoPorts
	file    string
	targets [2]string // names
}

func newApart(t *testing.T) *apart {
	t.Helper()
	p := &apart{file: filepath.Join(t.TempDir(), "disk")}
	if err := os.WriteFile(p.file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, near := runDir(t), loopback()
	b := netip.MustParseAddr(near).As4()
	b[1] ^= 0x40
	p.twoPorts = &twoPorts{dir: dir, first: near, second: netip.AddrFrom4(b).String()}
	p.inspected = &inspected{t: t, run: func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, append([]string{"--run-dir", dir}, args...)...)
	}}
	for i, at := range []string{p.first, p.second} {
		p.ok("target", "--background", "-a", at, "--provider", "roce", "-n", inspectedNQN, "--no-write-cache",
			"--min-cntlid", fmt.Sprint(1+1000*i), "--max-cntlid", fmt.Sprint(1000+1000*i),
			"--namespace", "file="+p.file+",shared,uuid=11111111-2222-4333-8444-555555555555")
		p.targets[i] = fmt.Sprint("target", i)
	}
	p.inspected.close = func() {
		p.run("disconnect", "--force", "-n", inspectedNQN)
		for _, name := range p.targets {
			p.run("target", "stop", "--target", name)
		}
	}
	return p
}

// lateWrite has the first target hold a write for some time, ends its connections, and writes
// newer data over the other target. It returns what is in the file after the first write, and
// how long the first one took.
func (p *apart) lateWrite(n int, hold time.Duration) (text string, took time.Duration) {
	p.t.Helper()
	before, after := fmt.Sprint("old ", n), fmt.Sprint("new ", n)
	p.ok("target", "fault", "--target", p.targets[0], fmt.Sprintf("opcode=write,count=1,hold=%v", hold))
	old, newer := p.client(), p.client()
	lost := make(chan error, 1)
	go func() { lost <- old.do(nbdWrite, 0, block(before), nbdPatience) }()
	eventually(p.t, "the write is with the first target", func() bool { return p.status().Paths[0].InFlight == 1 })
	held := time.Now()
	p.ok("target", "reject", "--target", p.targets[0], "6")
	p.ok("target", "drop", "--target", p.targets[0])
	if err := testenv.Receive(p.t, lost, "the answer to the first write"); err != nil {
		p.t.Fatal(err)
	}
	took = time.Since(held)
	if err := newer.write(after); err != nil {
		p.t.Fatal(err)
	}
	time.Sleep(time.Until(held.Add(hold + time.Second))) // the target is done with the old write by then
	data, err := os.ReadFile(p.file)
	if err != nil {
		p.t.Fatal(err)
	}
	return strings.TrimRight(string(data[:len(after)]), "\x00"), took
}

func (p *apart) client() *nbdClient {
	p.t.Helper()
	_, path, _ := strings.Cut(p.status().Devices[0].Device, "?socket=")
	c, err := dialNBD("unix", path, "1")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.close)
	return c
}

// TestLateWriteOfSeparateTarget checks that the word of a target that never knew a controller is
// not taken for its end: time is, and the status says so.
func TestLateWriteOfSeparateTarget(t *testing.T) {
	const hold = 3 * time.Second
	for _, c := range []struct {
		fence, want string
		rounds      int
	}{{"auto", "new", testenv.Rounds(1)}, {"none", "old", 1}} {
		t.Run(c.fence, func(t *testing.T) {
			p := newApart(t)
			defer p.close()
			p.ok(p.connectFlags("-a", p.first, "--path", p.second, "--policy", "preferred", "--fence", c.fence)...)
			for n := range c.rounds {
				p.live(2)
				fences := make(chan []control.Fence, 1)
				if c.fence == "auto" {
					go func() { fences <- p.waitsFor() }()
				}
				got, took := p.lateWrite(n, hold)
				if got != fmt.Sprint(c.want, " ", n) {
					t.Fatalf("round %d: the disk has %q, want the %s write", n, got, c.want)
				}
				for _, path := range p.status().Paths {
					if len(path.Vouched) != 0 {
						t.Errorf("path %s vouches for %v", path.Path, path.Vouched)
					}
				}
				if c.fence == "auto" {
					// Three times --keep-alive-tmo, and a second.
					if took < 7*time.Second {
						t.Errorf("the write took %v", took)
					}
					if f := testenv.Receive(t, fences, "a write that waits"); f[0].Changes != 1 || !strings.Contains(f[0].WaitsFor, "no other path knows the controller") {
						t.Errorf("it waits for %+v", f)
					}
				}
				p.ok("target", "clear", "--target", p.targets[0])
			}
		})
	}
}

// waitsFor returns what writes wait for, when some do.
func (p *apart) waitsFor() []control.Fence {
	for p.t.Context().Err() == nil {
		if f := p.status().Fences; len(f) > 0 && strings.Contains(f[0].WaitsFor, "since the loss") {
			return f
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// TestLateWriteOfServerThatWasGivenUp kills the server while one of two targets holds a write, gives
// the server up, and connects to the other target. The next server must not send a newer write
// before the first target must have ended the controller, which the second one never knew.
func TestLateWriteOfServerThatWasGivenUp(t *testing.T) {
	const hold = 6500 * time.Millisecond // less than the time within which a target ends a controller
	p := newApart(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first, "--path", p.second)...)
	p.live(2)
	p.ok("policy", inspectedNQN, "--policy", "preferred", "--preferred", p.second)
	p.ok("target", "fault", "--target", p.targets[1], fmt.Sprintf("opcode=write,count=1,hold=%v", hold))
	old := p.client()
	go func() { _ = old.do(nbdWrite, 0, block("old"), nbdPatience) }() // its connection ends
	eventually(t, "the write is with the target", func() bool { return p.status().Paths[1].InFlight == 1 })
	held := time.Now()
	p.kill(p.status().Name)
	p.ok("disconnect", "-n", inspectedNQN)
	if _, stderr, code := p.run(p.connectFlags("-a", p.first)...); code != exit.OK {
		t.Fatal(stderr)
	}
	if err := p.client().write("new"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(held.Add(hold + time.Second))) // the target is done with the old write by then
	data, err := os.ReadFile(p.file)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(data[:3]); got != "new" {
		t.Errorf("the disk has %q, want the newer write", got)
	}
}
