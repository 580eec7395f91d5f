package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/target"
)

// Who refuses, as connect says it.
const (
	hostRefuses       = "the host refuses: "
	controllerRefuses = "the controller refuses: "
	wrongPayload      = "a message has an incorrect payload"
	outOfTurn         = "a message came out of turn"
	wrongHostKey      = controllerRefuses + "authentication failed: it has another host key"
	wrongController   = hostRefuses + "authentication failed: the controller has another controller key"
	notCompleted      = "it was not completed: "
	endedEarly        = "the connection ended in the middle"
	endedAfterReply   = "the target ended it after the reply of this host, most likely because it has another host key, or no controller key: "
)

// authFaults are what a target, or somebody between it and the host, can do to the messages of
// an authentication. With SHA-512 and ffdhe2048, a Challenge is a header of 16 bytes, C1 of 64
// and g^x of 256, and a Success1 is a header of 16 bytes and R2 of 64.
var authFaults = []struct {
	fault string // of target fault
	host  string // what connect says of the queue
	ctrl  string // what the target counts; empty: it does not notice
}{
	// Truncated messages, where each part ends. The host finds zeroes behind the end.
	{"admin,auth=challenge,truncate=0", hostRefuses + wrongPayload + ": Negotiate of transaction 0, not 1", hostRefuses + wrongPayload},
	{"admin,auth=challenge,truncate=4", hostRefuses + wrongPayload + ": Challenge of transaction 0, not 1", hostRefuses + wrongPayload},
	{"admin,auth=challenge,truncate=8", hostRefuses + "the hash is not usable: the controller chose none, which was not offered", hostRefuses + "the hash is not usable"},
	{"admin,auth=challenge,truncate=9", controllerRefuses + wrongPayload, controllerRefuses + wrongPayload}, // no group
	{"admin,auth=challenge,truncate=10", hostRefuses + wrongPayload + ": a Challenge with values of 64 and 0 bytes", hostRefuses + wrongPayload},
	{"admin,auth=challenge,truncate=16", hostRefuses + wrongPayload + ": the public value is not in the range", hostRefuses + wrongPayload},
	{"admin,auth=challenge,truncate=80", hostRefuses + wrongPayload + ": the public value is not in the range", hostRefuses + wrongPayload},
	{"admin,auth=challenge,truncate=335", wrongHostKey, controllerRefuses + "authentication failed"},
	{"admin,auth=success1,truncate=0", hostRefuses + wrongPayload + ": Negotiate of transaction 0, not 1", hostRefuses + wrongPayload},
	{"admin,auth=success1,truncate=2", hostRefuses + wrongPayload + ": Success1 of transaction 0, not 1", hostRefuses + wrongPayload},
	{"admin,auth=success1,truncate=8", hostRefuses + "authentication failed: the controller does not prove that it has the controller key", hostRefuses + "authentication failed"},
	{"admin,auth=success1,truncate=16", wrongController, hostRefuses + "authentication failed"},
	{"qid=1,auth=success1,truncate=16", wrongController, hostRefuses + "authentication failed"},

	// A weaker method than the host offers, or than the target has chosen.
	{"admin,auth=challenge,patch=8:04", hostRefuses + "the hash is not usable: the controller chose hash 4, which was not offered", hostRefuses + "the hash is not usable"},
	{"admin,auth=challenge,patch=9:06", hostRefuses + "the Diffie-Hellman group is not usable: the controller chose group 6, which was not offered", hostRefuses + "the Diffie-Hellman group is not usable"},
	{"admin,auth=challenge,patch=6:2000,patch=8:01", controllerRefuses + wrongPayload, controllerRefuses + wrongPayload},
	{"admin,auth=challenge,patch=9:000000", controllerRefuses + wrongPayload, controllerRefuses + wrongPayload},
	{"admin,auth=success1,patch=8:00", hostRefuses + "authentication failed: the controller does not prove that it has the controller key", hostRefuses + "authentication failed"},

	// Another transaction, and messages out of turn.
	{"admin,auth=challenge,patch=4:ffff", hostRefuses + wrongPayload + ": Challenge of transaction 65535, not 1", hostRefuses + wrongPayload},
	{"admin,auth=success1,patch=4:0200", hostRefuses + wrongPayload + ": Success1 of transaction 2, not 1", hostRefuses + wrongPayload},
	{"qid=1,auth=challenge,patch=4:0100", hostRefuses + wrongPayload + ": Challenge of transaction 1, not 2", hostRefuses + wrongPayload},
	{"admin,auth=challenge,patch=1:03", hostRefuses + outOfTurn + ": Success1", hostRefuses + outOfTurn},
	{"admin,auth=success1,patch=1:01", hostRefuses + outOfTurn + ": Challenge", hostRefuses + outOfTurn},
	{"admin,auth=challenge,patch=0:00f0", hostRefuses + outOfTurn + ": Failure2", hostRefuses + outOfTurn},
	{"admin,auth=success1,patch=0:00f0", hostRefuses + outOfTurn + ": Failure2", hostRefuses + outOfTurn},

	// A failure in each step, with each reason.
	{"admin,auth=challenge,patch=0:00f1,patch=6:0101", controllerRefuses + "authentication failed)", endedEarly},
	{"admin,auth=challenge,patch=0:00f1,patch=6:0105", controllerRefuses + "the Diffie-Hellman group is not usable", endedEarly},
	{"admin,auth=challenge,patch=0:00f1,patch=6:0108", controllerRefuses + "reason 8", endedEarly},
	{"admin,auth=success1,patch=0:00f1,patch=6:0101", wrongHostKey + ", or no controller key", endedEarly},
	{"admin,auth=success1,patch=0:00f1,patch=6:0107", controllerRefuses + outOfTurn, endedEarly},

	// A connection that is lost at each message, and commands that fail.
	{"admin,auth=negotiate,disconnect", notCompleted, endedEarly},
	{"admin,auth=challenge,disconnect", notCompleted, endedEarly},
	{"admin,auth=reply,disconnect", endedAfterReply, endedEarly},
	{"admin,auth=success1,disconnect", endedAfterReply, endedEarly},
	{"admin,auth=success2,disconnect", notCompleted, endedEarly},
	{"qid=1,auth=challenge,disconnect", notCompleted, endedEarly},
	{"qid=1,auth=success1,disconnect", endedAfterReply, endedEarly},
	{"admin,auth=challenge,drop", notCompleted, "the host did not authenticate in time"},
	{"admin,auth=negotiate,status=0x2,dnr", notCompleted + "nvme status 002h", endedEarly},
	{"admin,auth=challenge,status=0x2,dnr", notCompleted + "nvme status 002h", endedEarly},
	{"admin,auth=reply,status=0x191,dnr", endedAfterReply + "nvme status 191h", endedEarly},
	// The target does not admit the host after all.
	{"admin,opcode=fabrics,skip=6,status=0x191,dnr", "enable controller: read CAP: nvme status 191h: authentication required", ""},
}

// refusalsOf counts what a target has refused because of authentication.
func refusalsOf(tg *target.Target, reason string) uint64 {
	return tg.Snapshot().Refusals["authentication: "+reason]
}

// TestAuthFaults connects to a target with each fault. Each time connect says which queue could not be
// authenticated and why, in one line and with the exit code for that, and nothing is left behind.
func TestAuthFaults(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	keys := []string{"-S", "@" + v.file("host.key"), "-C", "@" + v.file("ctrl.key"), "-k", "1"}
	for _, tt := range authFaults {
		t.Run(tt.fault, func(t *testing.T) {
			v.fault(t, tt.fault)
			before := refusalsOf(v.target, tt.ctrl)
			v.notProved(t, tt.fault, tt.host, keys...)
			if tt.ctrl != "" && refusalsOf(v.target, tt.ctrl) == before {
				t.Errorf("the target has refused %v, want %q", v.target.Snapshot().Refusals, tt.ctrl)
			}
		})
	}
	v.connect(authNQN, keys...)
	if _, errs, code := v.program("disconnect", "-n", authNQN); code != exit.OK {
		t.Errorf("disconnect: exit code %d, %s", code, errs)
	}
}

// fault adds a fault until the end of a test.
func (v *vault) fault(t *testing.T, text string) {
	t.Helper()
	f, err := options.ParseFault(text)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.target.Faults().Add(f).Remove)
}

// notProved connects, which must fail for want of authentication, with want in its message.
func (v *vault) notProved(t *testing.T, fault, want string, args ...string) {
	t.Helper()
	began := time.Now()
	out, errs, code := v.program(v.connectArgs(authNQN, args...)...)
	if code != exit.NotProved || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, want) {
		t.Errorf("exit code %d, %q%q, want code %d and %q", code, out, errs, exit.NotProved, want)
	}
	head := fmt.Sprintf("connect: authentication with subsystem %s at %s:4420 failed (", authNQN, v.addr)
	queue := regexp.MustCompile(`authentication of queue [01]: |enable controller: `)
	if !strings.Contains(errs, head) || !queue.MatchString(errs) || strings.Contains(errs, "queue 1") != strings.HasPrefix(fault, "qid=1") {
		t.Errorf("%q, want the subsystem and the queue", errs)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if left := visible(t, v.dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestAuthReplay checks that messages of the target are worth nothing in another run.
func TestAuthReplay(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	keys := []string{"-S", "@" + v.file("host.key"), "-C", "@" + v.file("ctrl.key")}
	connects := func() {
		t.Helper()
		v.connect(authNQN, keys...)
		if _, errs, code := v.program("disconnect", "-n", authNQN); code != exit.OK {
			t.Fatalf("disconnect: exit code %d, %s", code, errs)
		}
	}
	for fault, want := range map[string]string{
		"admin,auth=challenge,replay": wrongHostKey,
		"admin,auth=success1,replay":  wrongController,
		"qid=1,auth=success1,replay":  wrongController,
	} {
		t.Run(fault, func(t *testing.T) {
			v.fault(t, fault)
			connects() // the run that is recorded
			v.notProved(t, fault, want, keys...)
		})
	}
	// Authentication is another transaction each time on one connection.
	for fault, want := range map[string]string{
		"admin,auth=challenge,replay": hostRefuses + wrongPayload + ": Challenge of transaction 3, not 4",
		"admin,auth=success1,replay":  hostRefuses + wrongPayload + ": Success1 of transaction 3, not 4",
	} {
		t.Run("reauth "+fault, func(t *testing.T) {
			v.require(&target.HostAuth{Key: v.host, ControllerKey: v.controller, Groups: []auth.Group{auth.Null}, AdminOnly: true})
			v.connect(authNQN, keys...)
			v.reauth(t, exit.OK, "") // transaction 2
			v.fault(t, fault)
			v.reauth(t, exit.OK, "")
			v.reauth(t, exit.NotProved, want)
			if _, errs, code := v.program("disconnect", "-n", authNQN); code != exit.OK {
				t.Errorf("disconnect: exit code %d, %s", code, errs)
			}
		})
	}
}

func (v *vault) reauth(t *testing.T, want exit.Code, message string, args ...string) {
	t.Helper()
	_, errs, code := v.program(slices.Concat([]string{"reauth", authNQN}, args)...)
	if code != want || !strings.Contains(errs, message) {
		t.Errorf("reauth: exit code %d, %s, want code %d and %q", code, errs, want, message)
	}
}

// TestAuthKeys checks the message and the exit code for each key that is missing or wrong.
func TestAuthKeys(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	host, ctrl := "@"+v.file("host.key"), "@"+v.file("ctrl.key")
	plain := target.HostAuth{Key: v.host, ControllerKey: v.controller, Groups: []auth.Group{auth.Null}}
	other, err := auth.GenerateKey(auth.NoHash, 32)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		require func(a *target.HostAuth) *target.HostAuth // nil: as it is
		args    []string
		want    string
	}{
		"no key":               {nil, nil, "requires authentication of host nqn.2026-01.org.example:host; --dhchap-secret gives its key"},
		"wrong host key":       {nil, []string{"-S", ctrl}, "authentication of queue 0: " + wrongHostKey + ")"},
		"wrong controller key": {nil, []string{"-S", host, "-C", host}, "authentication of queue 0: " + wrongController},
		"keys swapped":         {nil, []string{"-S", ctrl, "-C", host}, "authentication of queue 0: " + wrongHostKey},
		"other key at the target": {func(a *target.HostAuth) *target.HostAuth { a.Key = other; return a },
			[]string{"-S", host}, "authentication of queue 0: " + wrongHostKey + ")"},
		"no controller key at the target": {func(a *target.HostAuth) *target.HostAuth { a.ControllerKey = nil; return a },
			[]string{"-S", host, "-C", ctrl}, "authentication of queue 0: " + wrongHostKey + ", or no controller key"},
		"no authentication at the target": {func(*target.HostAuth) *target.HostAuth { return nil },
			[]string{"-S", host, "-C", ctrl}, "authentication of queue 0: the target does not ask for authentication, so it does not prove that it has the controller key"},
	} {
		t.Run(name, func(t *testing.T) {
			a := plain
			now := &a
			if tt.require != nil {
				now = tt.require(now)
			}
			v.require(now)
			_, errs, code := v.program(v.connectArgs(authNQN, tt.args...)...)
			if code != exit.NotProved || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, tt.want) {
				t.Errorf("exit code %d, %q, want code %d and %q", code, errs, exit.NotProved, tt.want)
			}
			if left := visible(t, v.dir); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}
