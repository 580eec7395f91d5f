package initiator

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/verbs"
	"ublk-nvmeof/target"
)

// Messages of a host, by their number, and their parts with SHA-256 and the group null.
const (
	sentNegotiate = iota
	sentReply
	sentSuccess2
	chapHeader = 16
	chapHash   = 32
)

// carrier sends the nth message of a run in place of the host, and returns what the target answered.
type carrier func(n int, msg []byte, send func([]byte) error) error

// change sends another message than the nth one.
func change(which int, edit func(msg []byte) []byte) carrier {
	return func(n int, msg []byte, send func([]byte) error) error {
		if n == which {
			msg = edit(slices.Clone(msg))
		}
		return send(msg)
	}
}

func cut(which, length int) carrier {
	return change(which, func(msg []byte) []byte { return msg[:length] })
}

func set(which, at int, b ...byte) carrier {
	return change(which, func(msg []byte) []byte {
		copy(msg[at:], b)
		return msg
	})
}

// twice sends the nth message two times.
func twice(which int) carrier {
	return func(n int, msg []byte, send func([]byte) error) error {
		if err := send(msg); err != nil || n != which {
			return err
		}
		return send(msg)
	}
}

// The answers. Linux' target most often, but not always, ends the connection before the host can read
// the reason. It admits a host when it has taken its Reply, whatever follows.
const (
	prefix      = "^authentication of queue 0: "
	lostEarly   = prefix + "it was not completed: "
	lostReplied = prefix + "the target ended it after the reply of this host, most likely because it has another host key, or no controller key: "
	badPayload  = prefix + "the controller refuses: a message has an incorrect payload$"
	badTurn     = prefix + "the controller refuses: a message came out of turn$"
	badKey      = prefix + "the controller refuses: authentication failed"
	anyRefusal  = lostEarly + "|" + lostReplied + "|" + prefix + "the (host|controller) refuses: "
	notAdmitted = "^nvme status 191h: authentication required"
	lostLater   = "peer disconnected$" // although the host was admitted
)

// tampering is a message that is not what the host has sent.
type tampering struct {
	name  string
	carry carrier
	ours  string // what the host says with our target; empty: it is admitted
	linux string // the same with Linux' target
}

// tamperings returns all of them. earlier are the messages of an earlier run.
func tamperings(earlier [][]byte) []tampering {
	old := func(which int) carrier { return change(which, func([]byte) []byte { return earlier[which] }) }
	none := make([]byte, 4)
	return []tampering{
		{"Negotiate without a protocol", cut(sentNegotiate, 8), badPayload, anyRefusal},
		{"Negotiate of 7 bytes", cut(sentNegotiate, 7), badPayload, anyRefusal},
		{"Reply of 7 bytes", cut(sentReply, 7), badPayload, anyRefusal},
		{"Reply without values", cut(sentReply, chapHeader), badPayload, anyRefusal},
		{"Reply with half of R1", cut(sentReply, chapHeader+chapHash/2), badPayload, anyRefusal},
		{"Reply without C2", cut(sentReply, chapHeader+chapHash), badPayload, anyRefusal},
		{"Reply with half of C2", cut(sentReply, chapHeader+chapHash*3/2), badPayload, anyRefusal},
		{"Success2 of 8 bytes", cut(sentSuccess2, 8), notAdmitted, ""},

		{"Reply of an earlier run", old(sentReply), badKey, anyRefusal},
		{"Success2 of an earlier run", old(sentSuccess2), "", ""}, // it says nothing but that
		{"Negotiate twice", twice(sentNegotiate), badTurn, ""},    // Linux' target begins another run
		{"Reply twice", twice(sentReply), badTurn, anyRefusal},
		{"Success2 instead of Reply", set(sentReply, 1, 4), badTurn, anyRefusal},
		{"Reply instead of Success2", set(sentSuccess2, 1, 2), notAdmitted, lostLater},
		{"unknown message", set(sentReply, 0, 9, 9), badTurn, anyRefusal},
		{"Failure2 instead of Reply", set(sentReply, 0, 0, 0xf0), badTurn, anyRefusal},

		{"transaction of Reply", set(sentReply, 4, 0xff, 0xff), badPayload, anyRefusal},
		{"transaction of Success2", set(sentSuccess2, 4, 0xff, 0xff), notAdmitted, ""},

		{"no hash that is known", set(sentNegotiate, 12, 9, 9, 9), prefix + "the controller refuses: the hash is not usable", anyRefusal},
		{"no hash", set(sentNegotiate, 10, 0), prefix + "the controller refuses: the hash is not usable", anyRefusal},
		// Linux' target uses the group that it is told to use, also if it was not offered.
		{"no group that is known", set(sentNegotiate, 42, 9, 9, 9, 9, 9, 9), prefix + "the controller refuses: the Diffie-Hellman group is not usable", ""},
		{"unknown protocol", set(sentNegotiate, 8, 2), prefix + "the controller refuses: the authentication protocol is not usable", anyRefusal},
		{"secure channel", set(sentNegotiate, 6, 1), prefix + "the controller refuses: the secure channel does not match", anyRefusal},

		{"no proof is asked for", set(sentReply, 8, 0), prefix + "the host refuses: authentication failed: the controller does not prove that it has the controller key", prefix + "the host refuses: authentication failed: the controller does not prove that it has the controller key"},
		{"forged R1", set(sentReply, chapHeader, none...), badKey, anyRefusal},
		{"forged C2", set(sentReply, chapHeader+chapHash, none...), prefix + "the host refuses: authentication failed: the controller has another controller key", prefix + "the host refuses: authentication failed: the controller has another controller key"},
	}
}

// carried authenticates an admin queue whose messages a carrier sends, and uses it. If the target is to end
// the connection then, it waits for that.
func carried(t *testing.T, cfg Config, carry carrier, ends bool) error {
	t.Helper()
	if err := cfg.setDefaults(); err != nil {
		t.Fatal(err)
	}
	s := newSubsystem(cfg)
	c := s.newController(0, cfg.Path)
	a := c.newAssociation()
	ctx, cancel := a.during(t.Context())
	defer func() {
		cancel()
		if err := errors.Join(a.close(), s.mem.close()); err != nil {
			t.Error(err)
		}
	}()
	asked, err := c.openAdmin(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	method, err := c.authenticate(ctx, 0, asked, func(ctx context.Context, cmd *nvme.Command, in, out []byte) error {
		if in == nil {
			return a.admin.authPort(ctx, cmd, nil, out)
		}
		n++
		return carry(n-1, in, func(msg []byte) error {
			var cmd nvme.Command
			cmd.SetAuthSend(uint32(len(msg)))
			return a.admin.authPort(ctx, &cmd, msg, nil)
		})
	})
	if err == nil {
		if method != "sha256, null, two-way" {
			t.Fatalf("authenticated by %q", method)
		}
		_, err = a.admin.getProperty(ctx, nvme.PropCAP, true)
	}
	if err != nil || !ends {
		return err
	}
	select {
	case <-a.admin.lost:
		return a.admin.lossError()
	case <-time.After(5 * time.Second):
		return nil
	}
}

// tamper authenticates with each of the messages that are not what the host has sent, and checks what
// comes of it. linux says which target it is.
func tamper(t *testing.T, cfg Config, linux bool) {
	earlier := make([][]byte, 3)
	err := carried(t, cfg, func(n int, msg []byte, send func([]byte) error) error {
		earlier[n] = slices.Clone(msg)
		return send(msg)
	}, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tamperings(earlier) {
		t.Run(tt.name, func(t *testing.T) {
			began := time.Now()
			want := tt.ours
			if linux {
				want = tt.linux
			}
			err := carried(t, cfg, tt.carry, want == lostLater)
			t.Logf("%v", err)
			switch {
			case want == "" && err != nil:
				t.Errorf("%v, although nothing is wrong for the target", err)
			case want != "" && (err == nil || !regexp.MustCompile(want).MatchString(err.Error())):
				t.Errorf("%v, want %q", err, want)
			case strings.HasPrefix(want, prefix) && !errors.As(err, new(*AuthError)):
				t.Errorf("%v is no *AuthError", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	if err := carried(t, cfg, twice(-1), false); err != nil {
		t.Errorf("in the end: %v", err)
	}
}

// TestTamperedMessages changes what a host sends to our target.
func TestTamperedMessages(t *testing.T) {
	s := newSecured(t, target.Config{})
	s.host.Hashes, s.host.Groups = []auth.Hash{auth.SHA256}, []auth.Group{auth.Null}
	s.require()
	tamper(t, s.config(newLoops(t, 1), poller.Request{IO: 1}), false)
}

// TestTamperedMessagesLinux changes what a host sends to Linux' target. UN_TARGET names it as
// ADDR:PORT,NQN and UN_AUTH the host as NQN,FILE,FILE with its key and that of the controller.
func TestTamperedMessagesLinux(t *testing.T) {
	addr, nqn, ok := strings.Cut(os.Getenv("UN_TARGET"), ",")
	names := strings.Split(os.Getenv("UN_AUTH"), ",")
	if !ok || len(names) != 3 {
		testenv.Need(t, "auth-target", errors.New("UN_TARGET and UN_AUTH are not set"))
	}
	var keys [2]*auth.Key
	for i, name := range names[1:] {
		text, err := os.ReadFile(name)
		if err == nil {
			keys[i], err = auth.ParseKey(strings.TrimSpace(string(text)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	provider, err := verbs.New()
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(provider, newLoops(t, 1), poller.Request{IO: 1})
	cfg.Address, cfg.SubNQN, cfg.HostNQN = netip.MustParseAddrPort(addr), nqn, names[0]
	cfg.Credentials = Credentials{Host: keys[0], Controller: keys[1]}
	cfg.AdminTimeout, cfg.ConnectTimeout = 0, 0
	tamper(t, cfg, true)
}
