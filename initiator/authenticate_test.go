package initiator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/target"
)

const authHost = "nqn.2026-01.org.example:host-that-authenticates"

func newKey(t testing.TB, transform auth.Hash, size int) *auth.Key {
	t.Helper()
	k, err := auth.GenerateKey(transform, size)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// secured is a wire whose target requires authentication of authHost.
type secured struct {
	*wire
	t    testing.TB
	keys Credentials
	host target.HostAuth
}

func newSecured(t testing.TB, cfg target.Config) *secured {
	t.Helper()
	s := &secured{wire: newWire(t, cfg, target.NamespaceConfig{}), t: t}
	s.keys = Credentials{Host: newKey(t, auth.SHA256, 32), Controller: newKey(t, auth.SHA512, 64)}
	s.host = target.HostAuth{Key: s.keys.Host, ControllerKey: s.keys.Controller, Groups: []auth.Group{auth.FFDHE2048}}
	s.require()
	return s
}

// require has the target require what s.host says.
func (s *secured) require() {
	s.t.Helper()
	if err := s.sub.SetHostAuth(authHost, &s.host); err != nil {
		s.t.Fatal(err)
	}
}

func (s *secured) config(loops []*poller.Loop, q poller.Request) Config {
	cfg := s.wire.config(loops, q)
	cfg.HostNQN, cfg.Credentials = authHost, s.keys
	return cfg
}

// TestAuthentication connects with every hash and group, one-way and two-way, on all queues,
// and does I/O.
func TestAuthentication(t *testing.T) {
	s := newSecured(t, target.Config{})
	loops := newLoops(t, 1)
	for _, twoWay := range []bool{false, true} {
		for _, hash := range auth.Hashes() {
			for _, group := range auth.Groups() {
				way := map[bool]string{false: "one-way", true: "two-way"}[twoWay]
				t.Run(fmt.Sprintf("%v/%v/%s", hash, group, way), func(t *testing.T) {
					s.host.Hashes, s.host.Groups = []auth.Hash{hash}, []auth.Group{group}
					s.require()
					cfg := s.config(loops, poller.Request{IO: 1})
					cfg.AdminTimeout, cfg.ConnectTimeout = 20*time.Second, 20*time.Second // a busy machine is no error
					if !twoWay {
						cfg.Credentials.Controller = nil
					}
					c := connect(t, cfg)
					if got, want := c.Info().Paths[0].Auth, fmt.Sprintf("%v, %v, %s", hash, group, way); got != want {
						t.Errorf("authenticated by %q, want %q", got, want)
					}
					if errno := single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sectors: 8}); errno != 0 {
						t.Errorf("write: errno %d", errno)
					}
					closeSubsystem(t, c)
				})
			}
		}
	}
}

// TestAuthenticationRefused checks that each cause is named, and that none is called a
// timeout.
func TestAuthenticationRefused(t *testing.T) {
	s := newSecured(t, target.Config{})
	plain := s.host
	fabrics := func(fault target.Fault, skip int) func(*Config) { // skip: commands of a queue, Connect is the first
		return func(*Config) {
			fault.Match = target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.OpFabrics}}
			fault.Skip, fault.Count = skip, 1
			s.target.Faults().Add(fault)
		}
	}
	const challenge, reply, success = 2, 3, 4
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
		is     error // in the chain; nil: an *auth.Error
		other  bool  // neither
	}{
		"no key":               {func(c *Config) { c.Credentials = Credentials{} }, "authentication of queue 0: the target requires authentication, and there is no host key", ErrNoKey, false},
		"wrong host key":       {func(c *Config) { c.Credentials.Host = newKey(t, auth.NoHash, 32) }, "authentication of queue 0: the controller refuses: authentication failed: it has another host key", nil, false},
		"wrong controller key": {func(c *Config) { c.Credentials.Controller = newKey(t, auth.NoHash, 32) }, "authentication of queue 0: the host refuses: authentication failed: the controller has another controller key", nil, false},
		"no controller key":    {func(*Config) { s.host.ControllerKey = nil }, "the controller refuses: authentication failed: it has another host key, or no controller key", nil, false},
		"keys swapped": {func(c *Config) {
			c.Credentials.Host, c.Credentials.Controller = c.Credentials.Controller, c.Credentials.Host
		}, "the controller refuses: authentication failed", nil, false},
		"another host's key":        {func(c *Config) { c.HostNQN += "x" }, "authentication of queue 0: the target does not ask for authentication, so it does not prove that it has the controller key", ErrNotMutual, false},
		"downgraded to one way":     {fabrics(target.Fault{Patches: []target.Patch{{Offset: 8, Bytes: []byte{0}}}}, success), "the host refuses: authentication failed: the controller does not prove that it has the controller key", nil, false},
		"hash that was not offered": {fabrics(target.Fault{Patches: []target.Patch{{Offset: 8, Bytes: []byte{9}}}}, challenge), "the host refuses: the hash is not usable: the controller chose hash 9", nil, false},
		"truncated challenge":       {fabrics(target.Fault{Patches: []target.Patch{{Offset: 0, Bytes: make([]byte, 4096)}}}, challenge), "the host refuses: a message has an incorrect payload", nil, false},
		"wrong transaction":         {fabrics(target.Fault{Patches: []target.Patch{{Offset: 4, Bytes: []byte{77}}}}, challenge), "the host refuses: a message has an incorrect payload: Challenge of transaction", nil, false},
		"wrong R2":                  {fabrics(target.Fault{Patches: []target.Patch{{Offset: 16, Bytes: []byte("forged")}}}, success), "the host refuses: authentication failed: the controller has another controller key", nil, false},
		"dropped after the reply":   {fabrics(target.Fault{Disconnect: true}, success), "authentication of queue 0: the target ended it after the reply of this host, most likely because it has another host key", nil, true},
		"dropped before the reply":  {fabrics(target.Fault{Disconnect: true}, reply), "authentication of queue 0: ", nil, true},
		"silent":                    {fabrics(target.Fault{Drop: true}, challenge), "authentication of queue 0: it was not completed: ", nil, true},
		"silent after the reply":    {fabrics(target.Fault{Drop: true}, success), "authentication of queue 0: it was not completed: ", nil, true},
		"status":                    {fabrics(target.Fault{Status: nvme.StatusInvalidField | nvme.StatusDNR}, challenge), "authentication of queue 0: it was not completed: nvme status 002h", nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.config(newLoops(t, 1), poller.Request{IO: 1})
			limit := 10 * time.Second
			if strings.HasPrefix(name, "silent") {
				limit = 300 * time.Millisecond
			}
			cfg.AdminTimeout, cfg.ConnectTimeout = limit, limit
			defer s.target.Faults().Clear()
			defer func() { s.host = plain; s.require() }()
			tt.change(&cfg)
			s.require()
			c, err := Connect(t.Context(), cfg)
			if err == nil {
				closeSubsystem(t, c)
				t.Fatal("connected")
			}
			var failed *AuthError
			var refused *auth.Error
			if !errors.As(err, &failed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			switch {
			case tt.other:
			case tt.is == nil && !errors.As(err, &refused):
				t.Errorf("%v is no *auth.Error", err)
			case tt.is != nil && !errors.Is(err, tt.is):
				t.Errorf("%v is not %v", err, tt.is)
			}
		})
	}
}

// TestAuthenticationPerQueue checks that queues are authenticated exactly as the target
// asks, and that a failure names the queue.
func TestAuthenticationPerQueue(t *testing.T) {
	s := newSecured(t, target.Config{})
	sends := func() uint64 { return s.target.Snapshot().IO.Commands[nvme.OpFabrics] }
	for _, tt := range []struct {
		adminOnly bool
		want      uint64 // Connect; Negotiate, Challenge, Reply, Success1, Success2
	}{{true, 1}, {false, 6}} {
		s.host.AdminOnly = tt.adminOnly
		s.require()
		before := sends()
		c := connect(t, s.config(newLoops(t, 1), poller.Request{IO: 1}))
		if got := sends() - before; got != tt.want {
			t.Errorf("admin only %t: %d Fabrics commands on the I/O queue, want %d", tt.adminOnly, got, tt.want)
		}
		closeSubsystem(t, c)
	}
	s.target.Faults().Add(target.Fault{Match: target.Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpFabrics}}, Skip: 4, Count: 1, Patches: []target.Patch{{Offset: 16, Bytes: []byte("forged")}}})
	_, err := Connect(t.Context(), s.config(newLoops(t, 1), poller.Request{IO: 1}))
	if want := "authentication of queue 1: the host refuses: authentication failed: the controller has another controller key"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestReauthenticate authenticates again and again, with changing keys, while requests and
// reconnects go on.
func TestReauthenticate(t *testing.T) {
	s := newSecured(t, target.Config{})
	loops := newLoops(t, 1)
	c := connect(t, s.config(loops, poller.Request{IO: 1}))
	f := newFrontEnd(t, c.Namespaces()[0], loops, 16, 64<<10, 5)
	f.start(4000)
	losses := c.Info().Paths[0].Losses
	for i := range 12 {
		keys := &Credentials{Host: newKey(t, auth.NoHash, 48), Controller: newKey(t, auth.SHA384, 48)}
		switch i % 4 {
		case 0: // the host has new keys, and the target has not
			var refused *auth.Error
			if err := c.Reauthenticate(t.Context(), keys); !errors.As(err, &refused) {
				t.Errorf("with other keys: %v", err)
			}
			continue
		case 1:
			keys = nil
		case 3:
			keys.Controller = nil
			fallthrough
		default:
			s.host.Key, s.host.ControllerKey = keys.Host, keys.Controller
			s.host.Groups = []auth.Group{auth.Groups()[i%3]}
			s.require()
		}
		if err := c.Reauthenticate(t.Context(), keys); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if got := c.Info().Paths[0]; got.Losses != losses || !strings.HasSuffix(got.Auth, "one-way") {
		t.Errorf("%d losses, %q", got.Losses, got.Auth)
	}
	// The next association uses the last keys.
	s.target.Faults().Disconnect(-1)
	waitFor(t, "the next association", func() bool { return c.Info().Paths[0].Losses > losses && c.Info().State == StateLive })
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestReauthenticateNothing checks the errors without a run.
func TestReauthenticateNothing(t *testing.T) {
	s := newSecured(t, target.Config{})
	cfg := s.wire.config(newLoops(t, 1), poller.Request{IO: 1}) // of a host that need not authenticate
	c := connect(t, cfg)
	if err := c.Reauthenticate(t.Context(), &s.keys); !errors.Is(err, errNotAgain) {
		t.Errorf("target that did not ask: %v", err)
	}
	closeSubsystem(t, c)
}

// TestAuthenticationAtReconnect checks that an association that cannot be authenticated is
// tried again, and that its requests wait until the keys match.
func TestAuthenticationAtReconnect(t *testing.T) {
	s := newSecured(t, target.Config{})
	loops := newLoops(t, 1)
	c := connect(t, s.config(loops, poller.Request{IO: 1}))
	good := s.host
	s.host.Key = newKey(t, auth.NoHash, 32)
	s.require()
	s.target.Faults().Disconnect(-1)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 64<<10, 6)
	f.start(200)
	waitFor(t, "a failed attempt", func() bool {
		var failed *AuthError
		return c.Info().Paths[0].Attempts >= 2 && errors.As(c.Info().Paths[0].Failure, &failed)
	})
	s.host = good
	s.require()
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestReauthenticateUntried checks that keys which are given while no path is connected are those of
// the next association. The target has changed them, so without that there would be none.
func TestReauthenticateUntried(t *testing.T) {
	s := newSecured(t, target.Config{})
	loops := newLoops(t, 1)
	c := connect(t, s.config(loops, poller.Request{IO: 1}))
	next := Credentials{Host: newKey(t, auth.NoHash, 32)}
	s.host.Key, s.host.ControllerKey = next.Host, nil
	s.require()
	s.target.Faults().Disconnect(-1)
	waitFor(t, "a failed attempt", func() bool { return c.Info().Paths[0].Attempts >= 1 && c.Info().Paths[0].Failure != nil })
	if err := c.Reauthenticate(t.Context(), nil); !errors.Is(err, ErrNotConnected) || errors.Is(err, ErrKeysUntried) {
		t.Errorf("without keys: %v", err)
	}
	if err := c.Reauthenticate(t.Context(), &next); !errors.Is(err, ErrNotConnected) || !errors.Is(err, ErrKeysUntried) {
		t.Errorf("with keys: %v", err)
	}
	if errno := single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sectors: 8}); errno != 0 {
		t.Errorf("errno %d", errno)
	}
	waitFor(t, "the next association", func() bool { return c.Info().State == StateLive })
	if err := c.Reauthenticate(t.Context(), nil); err != nil {
		t.Errorf("with the next association: %v", err)
	}
	closeSubsystem(t, c)
}

// TestAuthenticationDemanded checks that a queue on which the target demands authentication in
// the middle is connected again, and that no request fails.
func TestAuthenticationDemanded(t *testing.T) {
	s := newSecured(t, target.Config{})
	loops := newLoops(t, 1)
	c := connect(t, s.config(loops, poller.Request{IO: 1}))
	s.target.Faults().Add(target.Fault{Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Status: nvme.StatusAuthRequired | nvme.StatusDNR})
	if errno := single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sectors: 8}); errno != 0 {
		t.Errorf("errno %d", errno)
	}
	if c.Info().Paths[0].Losses != 1 {
		t.Errorf("%d losses", c.Info().Paths[0].Losses)
	}
	closeSubsystem(t, c)
}

// TestSecretsAreNotLogged looks for keys in what a controller logs.
func TestSecretsAreNotLogged(t *testing.T) {
	s := newSecured(t, target.Config{})
	var mu sync.Mutex
	var out bytes.Buffer
	cfg := s.config(newLoops(t, 1), poller.Request{IO: 1})
	cfg.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &out}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Log.Debug("configuration", "config", fmt.Sprintf("%+v", cfg))
	c := connect(t, cfg)
	_ = c.Reauthenticate(t.Context(), &Credentials{Host: s.keys.Controller, Controller: s.keys.Host})
	closeSubsystem(t, c)
	mu.Lock()
	defer mu.Unlock()
	for _, k := range []*auth.Key{s.keys.Host, s.keys.Controller} {
		for _, bound := range [][]byte{k.Bound(authHost), k.Bound(fakeNQN)} {
			if strings.Contains(out.String(), k.Text()[10:30]) || strings.Contains(out.String(), fmt.Sprintf("%x", bound)) {
				t.Errorf("a secret is in the log:\n%s", out.String())
			}
		}
	}
	if !strings.Contains(out.String(), "sha512, ffdhe2048, two-way") {
		t.Errorf("the log does not say how the queue was authenticated:\n%s", out.String())
	}
}

type lockedWriter struct {
	mu  *sync.Mutex
	out *bytes.Buffer
}

func (w lockedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(b)
}

// TestDiscoveryAuthenticates checks that a discovery controller authenticates as others do,
// and that a controller key does not keep it from services that do not ask.
func TestDiscoveryAuthenticates(t *testing.T) {
	s := newSecured(t, target.Config{})
	cfg := s.config(nil, poller.Request{})
	cfg.SubNQN, cfg.Discovery = nvme.DiscoveryNQN, true
	c := connect(t, cfg)
	if got := c.Info().Paths[0].Auth; got != "" {
		t.Errorf("authenticated by %q", got)
	}
	closeSubsystem(t, c)
	if err := s.target.Discovery().SetHostAuth(authHost, &s.host); err != nil {
		t.Fatal(err)
	}
	c = connect(t, cfg)
	if got := c.Info().Paths[0].Auth; got != "sha512, ffdhe2048, two-way" {
		t.Errorf("authenticated by %q", got)
	}
	closeSubsystem(t, c)
	cfg.Credentials = Credentials{}
	if _, err := Connect(t.Context(), cfg); !errors.Is(err, ErrNoKey) {
		t.Errorf("without a key: %v", err)
	}
}

// BenchmarkAuthentication authenticates an I/O queue, with its messages on the wire.
func BenchmarkAuthentication(b *testing.B) {
	for _, group := range auth.Groups() {
		b.Run(group.String(), func(b *testing.B) {
			s := newSecured(b, target.Config{})
			s.host.Groups = []auth.Group{group}
			s.require()
			sub := connect(b, s.config(newLoops(b, 1), poller.Request{IO: 1}))
			c := sub.slots[0]
			a := c.current()
			for b.Loop() {
				b.StopTimer()
				q := queueParam{remote: a.remote, qid: 2, depth: 16, cntlid: a.cntlid}
				conn, err := c.dial(b.Context(), q)
				if err != nil {
					b.Fatal(err)
				}
				if err := c.establish(b.Context(), conn, q); err != nil {
					b.Fatal(err)
				}
				buffer := <-a.admin.buffers
				done, err := c.connectCommand(b.Context(), conn, q, a.admin.mr, buffer*adminBuffer)
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				method, err := c.authenticate(b.Context(), 2, nvme.ConnectResult(done.DW0()), conn.authPort(a.admin, buffer))
				b.StopTimer()
				if err != nil || method == "" {
					b.Fatal(method, err)
				}
				a.admin.buffers <- buffer
				if err := conn.close(); err != nil {
					b.Fatal(err)
				}
				waitFor(b, "the end of the queue", func() bool { return s.target.Snapshot().Connections == 2 })
				b.StartTimer()
			}
			closeSubsystem(b, sub)
		})
	}
}

// TestReauthenticateQueues checks that the I/O queues for which the target has asked for
// authentication are authenticated again, while they are full of requests, and what a failure
// there means.
func TestReauthenticateQueues(t *testing.T) {
	s := newSecured(t, target.Config{})
	sends := func() uint64 { return s.target.Snapshot().IO.Commands[nvme.OpFabrics] }
	loops := newLoops(t, 1)
	for _, tt := range []struct {
		adminOnly bool
		want      uint64 // Negotiate, Challenge, Reply, Success1, Success2
	}{{true, 0}, {false, 5}} {
		s.host.AdminOnly = tt.adminOnly
		s.require()
		cfg := s.config(loops, poller.Request{IO: 1})
		cfg.QueueSize = MinQueueSize
		c := connect(t, cfg)
		f := newFrontEnd(t, c.Namespaces()[0], loops, 4*MinQueueSize, 16<<10, 5)
		f.start(1 << 30)
		before := sends()
		if err := c.Reauthenticate(t.Context(), nil); err != nil {
			t.Error(err)
		}
		if got := sends() - before; got != tt.want {
			t.Errorf("admin only %t: %d commands on the I/O queue, want %d", tt.adminOnly, got, tt.want)
		}
		if !tt.adminOnly {
			io := target.Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpFabrics}}
			for _, fault := range []target.Fault{
				{Match: io, Skip: 3, Count: 1, Patches: []target.Patch{{Offset: 16, Bytes: []byte("forged")}}},
				{Match: io, Skip: 2, Count: 1, Disconnect: true},
			} {
				s.target.Faults().Add(fault)
				err := c.Reauthenticate(t.Context(), nil)
				if !errors.Is(err, ErrKeysAccepted) || !strings.Contains(err.Error(), "authentication of queue 1: ") {
					t.Errorf("%+v: %v", fault, err)
				}
				s.target.Faults().Clear()
				waitFor(t, "the association", func() bool { return c.Info().State == StateLive })
			}
		}
		loops[0].Call(func() { f.jobs[0].left = 100 })
		for _, err := range f.wait(time.Minute) {
			t.Error(err)
		}
		f.close()
		closeSubsystem(t, c)
	}
}

// TestReauthenticatePaths checks that all paths are authenticated again, and what it means if the
// target of one of them has another key.
func TestReauthenticatePaths(t *testing.T) {
	h := newHall(t, 2, true, nil)
	host := testConfig(nil, h.loops, poller.Request{IO: 1}).HostNQN
	require := func(n int, key *auth.Key) {
		t.Helper()
		if err := h.subs[n].SetHostAuth(host, &target.HostAuth{Key: key, Groups: []auth.Group{auth.Null}}); err != nil {
			t.Fatal(err)
		}
	}
	old, next := newKey(t, auth.NoHash, 32), newKey(t, auth.NoHash, 32)
	require(0, old)
	require(1, old)
	s := h.connect(func(c *Config) { c.Credentials.Host, c.AdminTimeout = old, 20*time.Second })
	both := func() {
		t.Helper()
		before := s.Info().Paths
		h.fabric.KillAll(sideAddr(0))
		h.fabric.KillAll(sideAddr(1))
		waitFor(t, "both paths", func() bool {
			for n, p := range s.Info().Paths {
				if p.State != StateLive || p.Losses == before[n].Losses {
					return false
				}
			}
			return true
		})
	}
	if err := s.Reauthenticate(t.Context(), &Credentials{Host: next}); err == nil || errors.Is(err, ErrKeysAccepted) ||
		!strings.Contains(err.Error(), portAddr(0).String()) || !strings.Contains(err.Error(), portAddr(1).String()) {
		t.Errorf("a key that no target has: %v", err)
	}
	both() // with the old key
	require(1, next)
	err := s.Reauthenticate(t.Context(), &Credentials{Host: next})
	if !errors.Is(err, ErrKeysAccepted) || !errors.As(err, new(*AuthError)) || !strings.Contains(err.Error(), portAddr(0).String()) || strings.Contains(err.Error(), portAddr(1).String()) {
		t.Errorf("a key that one target has: %v", err)
	}
	require(0, next)
	both()
	// Silence on both paths is over when the time is, and names both.
	for n := range 2 {
		h.targets[n].Faults().Add(target.Fault{Match: target.Match{Admin: true, Messages: []auth.Kind{auth.Reply}}, Count: 1, Drop: true})
	}
	before := s.Info().Paths
	within, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	err = s.Reauthenticate(within, &Credentials{Host: old})
	if took := time.Since(began); took > s.cfg.AdminTimeout/2 {
		t.Errorf("it took %v", took)
	}
	if !errors.As(err, new(*AuthError)) || errors.Is(err, ErrKeysAccepted) || strings.Count(err.Error(), "authentication of queue 0: it was not completed") != 2 {
		t.Errorf("silence: %v", err)
	}
	waitFor(t, "both paths", func() bool {
		for n, p := range s.Info().Paths {
			if p.State != StateLive || p.Losses == before[n].Losses {
				return false
			}
		}
		return true
	})
	if err := s.Reauthenticate(t.Context(), nil); err != nil {
		t.Error(err)
	}
}
