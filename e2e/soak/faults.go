package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"
)

// fault is something that goes wrong, and is over when run returns, but for faults of
// commands, which the caller clears.
type fault struct {
	name   string
	weight int  // how often, in comparison with others; 0 is 1
	kills  bool // the server or the target
	run    func()
}

// commandFaults are faults of commands, for target fault. A fault without an end of
// its own is cleared after a second.
var commandFaults = []string{
	"opcode=write,delay=300ms,count=20", "opcode=read,delay=300ms,count=20",
	"opcode=write,hold=2s,count=4", "opcode=flush,delay=2s,count=3",
	"opcode=write,disconnect,count=2", "opcode=read,disconnect,count=2", "opcode=flush,disconnect,count=1",
	"opcode=write,skip=20,disconnect,count=1", "qid=1,disconnect,count=1",
	"opcode=write,status=0x6,count=2", "opcode=read,status=0x6,count=2", "opcode=flush,status=0x6,count=2",
	"opcode=write,status=0x82,crd=1,count=4", "opcode=read,status=0x82,crd=3,count=2",
	"opcode=write-zeroes,status=0x6,count=1", "opcode=write-zeroes,disconnect,count=1",
	"corrupt=id,count=1", "corrupt=duplicate,count=1", "corrupt=short,count=1", "corrupt=sqhead,count=1",
	"opcode=read,corrupt=key,count=1", "opcode=write,corrupt=key,count=1",
	"opcode=write,corrupt=lost,count=1", "opcode=read,drop,count=1",
	"admin,opcode=keep-alive,drop,count=2", "admin,opcode=keep-alive,disconnect,count=1",
	"admin,opcode=keep-alive,corrupt=id,count=1", "admin,opcode=keep-alive,status=0x6,count=1",
}

// adminFaults are faults of commands that a host sends when it connects, or looks at
// its namespaces.
var adminFaults = []string{
	"admin,opcode=identify,status=0x6,count=1", "admin,opcode=identify,skip=2,status=0x6,count=2",
	"admin,opcode=identify,disconnect,count=1", "admin,opcode=identify,skip=3,disconnect,count=1",
	"cns=3,status=0x6,count=2", "cns=0,nsid=2,status=0x6,count=2", "cns=2,status=0x6,count=1",
	"lid=4,count=1,corrupt=lost", "lid=4,count=1,corrupt=data", "lid=4,count=1,status=0x6",
	"admin,opcode=identify,drop,count=1", "admin,opcode=fabrics,disconnect,count=1",
	"admin,opcode=set-features,status=0x6,count=1", "admin,opcode=set-features,disconnect,count=1",
	"opcode=fabrics,disconnect,count=1", "admin,opcode=async-event,status=0x6,count=1",
}

// networks are what happens to packets.
var networks = []condition{
	{name: "loss of 1%", lost: 0.01},
	{name: "loss of 5%", lost: 0.05},
	{name: "duplicates", doubled: 0.02},
	{name: "all of it", lost: 0.02, doubled: 0.01, damaged: 0.001, slowed: 0.3, delay: time.Millisecond, jitter: time.Millisecond},
	{name: "loss of 20%", lost: 0.2},
	{name: "cut", lost: 1},
	{name: "delay", slowed: 1, delay: 2 * time.Millisecond, jitter: time.Millisecond},
	{name: "reordering", slowed: 0.25, delay: 5 * time.Millisecond},
	{name: "damage", damaged: 0.005},
}

// some returns one of the cables, or all of them.
func (s *soak) some(random *rand.Rand) []*cable {
	if n := random.IntN(len(s.cables) + 1); n < len(s.cables) {
		logf("  path %d", n)
		return s.cables[n : n+1]
	}
	return s.cables
}

// pathFaults returns what can go wrong with one of several paths.
func (s *soak) pathFaults(random *rand.Rand, pause func(least, most time.Duration)) []fault {
	port := func() string { return fmt.Sprint("--port=", 1+random.IntN(len(s.cables))) }
	return []fault{
		{name: "path drop", weight: 2, run: func() {
			for range 1 + random.IntN(4) {
				s.control("drop", port())
				pause(0, 300*time.Millisecond)
			}
		}},
		{name: "path removed", weight: 2, run: func() {
			path := targetAddr(random.IntN(len(s.cables)))
			s.host("disconnect", "-n", nqn, "--path", path)
			pause(0, time.Second)
			s.host("connect", "-n", nqn, "-q", "nqn.2026-01.org.example:soak-host", "-a", path)
		}},
		{name: "path grant", run: func() {
			path := port()
			for _, n := range []string{"5", "3", "1", "4"} {
				s.control("grant", n)
				s.control("drop", path)
				pause(0, 500*time.Millisecond)
			}
		}},
		{name: "path policy", run: func() {
			args := []string{"policy", nqn, "--policy", []string{"queue-depth", "round-robin", "preferred"}[random.IntN(3)]}
			if args[3] == "preferred" {
				args = append(args, "--preferred", targetAddr(random.IntN(len(s.cables))))
			}
			s.host(args...)
		}},
		{name: "path ana", weight: 2, run: func() {
			states := []string{"optimized", "non-optimized", "inaccessible", "change", "persistent-loss"}
			for range 3 {
				s.control("ana", fmt.Sprint(1+random.IntN(2)), states[random.IntN(len(states))], port())
				pause(0, 500*time.Millisecond)
			}
			s.control("ana", "1", "optimized")
			s.control("ana", "2", "optimized")
		}},
		{name: "kill without a path", kills: true, run: func() {
			cut := s.cables[random.IntN(len(s.cables))]
			s.fio.pause()
			s.control("fault", "opcode=write,hold=3s,count=2")
			pause(0, 500*time.Millisecond)
			s.treat([]*cable{cut}, condition{lost: 1})
			pause(0, 3*time.Second)
			s.kill()
			s.recover()
			s.treat(s.cables, condition{})
		}},
	}
}

// faults returns what can go wrong, or of that what only names.
func (s *soak) faults(random *rand.Rand, only string) []fault {
	pause := func(least, most time.Duration) {
		time.Sleep(least + time.Duration(random.Int64N(int64(most-least+1))))
	}
	of := func(list []string) string { return list[random.IntN(len(list))] }
	nextCommand, nextAdmin := deck(random, commandFaults), deck(random, adminFaults)
	all := []fault{
		{name: "command", weight: 6, run: func() {
			f := nextCommand()
			logf("  %s", f)
			s.control("fault", f)
			pause(time.Second, 2*time.Second)
		}},
		{name: "admin", weight: 4, run: func() {
			f := nextAdmin()
			logf("  %s", f)
			s.control("fault", f)
			s.control("namespace", "add", "ram=1MiB,nsid=9")
			s.control("drop")
			pause(time.Second, 3*time.Second)
			s.control("namespace", "remove", "9")
			pause(0, time.Second)
		}},
		{name: "drop", run: func() {
			args := []string{"drop"}
			if random.IntN(2) == 0 {
				args = append(args, fmt.Sprint("--qid=", random.IntN(5)))
			}
			s.control(args...)
			pause(0, time.Second)
		}},
		{name: "grant", run: func() {
			s.control("grant", fmt.Sprint(1+random.IntN(6)))
			s.control("drop")
			pause(0, 2*time.Second)
		}},
		{name: "freeze", run: func() {
			length := 100*time.Millisecond + time.Duration(random.Int64N(int64(9*time.Second)))
			s.control("freeze", length.String())
			pause(length, length)
		}},
		{name: "stall", run: func() {
			s.control("stall", "on")
			pause(100*time.Millisecond, 4*time.Second)
			s.control("stall", "off")
		}},
		{name: "refuse", run: func() {
			verb, status := "reject", "6"
			if random.IntN(2) == 0 {
				verb, status = "refuse", "0x182"
			}
			s.control(verb, status)
			s.control("drop")
			pause(0, 3*time.Second)
			s.control(verb, "off")
		}},
		{name: "restart", run: func() { // its namespaces come later than its port
			s.control("reject", "6")
			s.control("drop")
			s.control("namespace", "hide", "2s")
			s.control("reject", "off")
			pause(2*time.Second, 3*time.Second)
		}},
		{name: "ana", run: func() {
			s.control("ana", "2", of([]string{"change", "inaccessible", "non-optimized"}))
			pause(0, 3*time.Second)
			s.control("ana", "2", "optimized")
		}},
		{name: "network", weight: 3, run: func() {
			n := networks[random.IntN(len(networks))]
			logf("  %v", n)
			s.treat(s.some(random), n)
			pause(time.Second, 6*time.Second)
			s.treat(s.cables, condition{})
		}},
		{name: "kill", kills: true, run: func() {
			s.kill()
			pause(0, time.Second)
			s.recover()
		}},
		{name: "kill with held writes", kills: true, run: func() {
			s.fio.pause() // it would wait until its writes were let go
			s.control("fault", "opcode=write,hold=3s,count=3")
			pause(200*time.Millisecond, 500*time.Millisecond)
			s.kill()
			s.recover()
		}},
		{name: "kill in a bad network", kills: true, run: func() {
			n := networks[random.IntN(4)]
			logf("  %v", n)
			s.treat(s.cables, n)
			pause(0, time.Second)
			s.kill()
			s.recover()
			s.treat(s.cables, condition{})
		}},
		{name: "target killed", kills: true, run: func() {
			s.endTarget(syscall.SIGKILL)
			pause(0, 2*time.Second)
			s.startTarget(of([]string{"0s", "0s", "2s"}))
		}},
		{name: "both killed", kills: true, run: func() {
			s.kill()
			s.endTarget(syscall.SIGKILL)
			s.startTarget(of([]string{"0s", "1s"}))
			s.recover()
		}},
	}
	if len(s.cables) > 1 {
		all = append(all, s.pathFaults(random, pause)...)
	}
	var chosen []fault
	for _, f := range all {
		if only == "" || strings.Contains(","+only+",", ","+f.name+",") {
			for range max(1, f.weight) {
				chosen = append(chosen, f)
			}
		}
	}
	if len(chosen) == 0 {
		fatalf("-only %q names no fault", only)
	}
	return chosen
}

// deck returns the elements of a list in random order, all of them before one comes
// again.
func deck(random *rand.Rand, list []string) func() string {
	var order []int
	return func() string {
		if len(order) == 0 {
			order = random.Perm(len(list))
		}
		next := list[order[0]]
		order = order[1:]
		return next
	}
}
