package initiator

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/target"
)

// TestAuthenticationOffLoops checks that the thread of a loop, which serves I/O, does none of the
// arithmetic of authentication, neither of a queue that is connected nor of one that is in use.
// With the largest group, one exponentiation takes much longer than everything that a loop does
// for the messages.
func TestAuthenticationOffLoops(t *testing.T) {
	s := newSecured(t, target.Config{})
	s.host.Groups = []auth.Group{auth.FFDHE8192}
	s.require()
	loops := newLoops(t, 1)
	const queues, each = 2, 2 // the admin queue and an I/O queue; g^y and the shared value
	exponentiation(t)         // the first one computes the prime as well
	least := queues * each * exponentiation(t)

	measure := func(what string, do func()) {
		t.Helper()
		before := threadTime(t, loops[0])
		do()
		used := threadTime(t, loops[0]) - before
		t.Logf("%s: the loop used %v of processor time; the arithmetic takes %v", what, used, least)
		if used > least/8 {
			t.Errorf("%s: the loop's thread does arithmetic", what)
		}
	}
	var c *Subsystem
	measure("connect", func() { c = connect(t, s.config(loops, poller.Request{IO: 1})) })
	measure("reauthenticate", func() {
		if err := c.Reauthenticate(t.Context(), nil); err != nil {
			t.Error(err)
		}
	})
	if got, want := c.Info().Paths[0].Auth, "sha512, ffdhe8192, two-way"; got != want {
		t.Errorf("authenticated by %q, want %q", got, want)
	}
	closeSubsystem(t, c)
}

// exponentiation returns the processor time of one with the largest group, which is what a run of
// a host waits for, measured on a thread of its own.
func exponentiation(t *testing.T) time.Duration {
	t.Helper()
	loop := newLoops(t, 1)[0]
	controller := auth.NewController(auth.ControllerConfig{Key: newKey(t, auth.NoHash, 32), Groups: []auth.Group{auth.FFDHE8192}})
	host, err := auth.NewHost(auth.HostConfig{HostNQN: "host", SubNQN: "subsystem", Key: newKey(t, auth.NoHash, 32)})
	if err != nil {
		t.Fatal(err)
	}
	before := threadTime(t, loop)
	if err := loop.Call(func() { controller.Take(host.Negotiate()) }); err != nil { // computes g^x
		t.Fatal(err)
	}
	if controller.Due() != auth.Challenge {
		t.Fatalf("%v is due", controller.Due())
	}
	return threadTime(t, loop) - before
}

// threadTime returns the processor time that the thread of a loop has used.
func threadTime(t *testing.T, loop *poller.Loop) time.Duration {
	t.Helper()
	var now unix.Timespec
	var err error
	if err := loop.Call(func() { err = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}
