package target

import (
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/nvme"
)

// newProver returns a rig that requires authentication of hostNQN, and the host's side.
func newProver(t *testing.T) (*rig, *HostAuth, func() *auth.Host) {
	t.Helper()
	key, err := auth.GenerateKey(auth.SHA256, 32)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, Config{}, SubsystemConfig{AllowHosts: []string{hostNQN}})
	a := &HostAuth{Key: key, ControllerKey: key, Groups: []auth.Group{auth.Null}}
	if err := r.subsys.SetHostAuth(hostNQN, a); err != nil {
		t.Fatal(err)
	}
	transaction := uint16(0)
	return r, a, func() *auth.Host {
		transaction++
		host, err := auth.NewHost(auth.HostConfig{HostNQN: hostNQN, SubNQN: testNQN, Key: key, ControllerKey: key, Transaction: transaction})
		if err != nil {
			t.Fatal(err)
		}
		return host
	}
}

// unproved connects an admin queue that must be authenticated.
func (r *rig) unproved(kato uint32) *hostQueue {
	r.t.Helper()
	h := r.mustDial(0, adminDepth)
	cmd, _ := h.connectCommand(testNQN, 0, nvme.CNTLIDDynamic, kato)
	result := nvme.ConnectResult(h.want(0, cmd).DW0())
	if !result.AuthRequired() || result.SecureChannelRequired() {
		r.t.Fatalf("result %#x", result)
	}
	h.cntlid = result.CNTLID()
	return h
}

func (h *hostQueue) authSend(want nvme.Status, msg []byte) {
	h.t.Helper()
	copy(h.data.Bytes(), msg)
	var cmd nvme.Command
	cmd.SetAuthSend(uint32(len(msg)))
	h.want(want, h.keyed(&cmd, len(msg)))
}

func (h *hostQueue) authReceive() []byte {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetAuthReceive(auth.MaxMessage)
	h.want(0, h.keyed(&cmd, auth.MaxMessage))
	return h.data.Bytes()[:auth.MaxMessage]
}

// prove runs the protocol to its end.
func (h *hostQueue) prove(host *auth.Host) error {
	h.t.Helper()
	for msg := host.Negotiate(); ; {
		h.authSend(0, msg)
		if host.Authenticated() {
			return nil
		}
		var err error
		if msg, err = host.Next(h.authReceive()); err != nil || msg == nil {
			return err
		}
	}
}

// Until a queue is authenticated, it executes nothing. Afterwards it does, also when the
// host authenticates once more, and fails.
func TestUnprovedQueue(t *testing.T) {
	r, a, host := newProver(t)
	h := r.unproved(0)
	var get, set, identify nvme.Command
	get.SetPropertyGet(nvme.PropCAP, true)
	set.SetPropertySet(nvme.PropCC, uint64(nvme.NewCC(nvme.CCSelectNVM).WithEN(true)), false)
	identify.SetIdentify(nvme.CNSController, 0, 0)
	for _, cmd := range []*nvme.Command{&get, &set, h.keyed(&identify, nvme.IdentifySize)} {
		h.want(nvme.StatusAuthRequired|dnr, cmd)
	}
	if err := h.prove(host()); err != nil {
		t.Fatal(err)
	}
	h.want(0, &get)
	h.want(0, &set)
	h.want(0, &identify)

	// The same host, with a key that is not that of the target any more.
	other, err := auth.GenerateKey(auth.NoHash, 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.subsys.SetHostAuth(hostNQN, &HostAuth{Key: other, Groups: a.Groups}); err != nil {
		t.Fatal(err)
	}
	if err := h.prove(host()); err == nil || !strings.Contains(err.Error(), "the controller refuses: authentication failed") {
		t.Errorf("authenticated again: %v", err)
	}
	h.want(0, &get)
	if err := r.subsys.SetHostAuth(hostNQN, a); err != nil {
		t.Fatal(err)
	}
	if err := h.prove(host()); err != nil {
		t.Error(err)
	}
	if n := r.target.Snapshot().Refusals["authentication: the controller refuses: authentication failed"]; n != 1 {
		t.Errorf("%v", r.target.Snapshot().Refusals)
	}

	// An I/O queue of the same controller must be authenticated as well.
	io := r.mustDial(1, 16)
	connect, _ := io.connectCommand(testNQN, 1, h.cntlid, 0)
	if !nvme.ConnectResult(io.want(0, connect).DW0()).AuthRequired() {
		t.Error("the I/O queue needs no authentication")
	}
	var read nvme.Command
	read.SetRead(1, 0, 1, false)
	io.want(nvme.StatusAuthRequired|dnr, io.keyed(&read, 512))
	if err := io.prove(host()); err != nil {
		t.Error(err)
	}
	io.want(nvme.StatusInvalidNamespace|dnr, &read)
}

// A host that does not finish ends after its keep alive timeout, and one that is refused
// soon after it could read why.
func TestUnprovedQueueEnds(t *testing.T) {
	r, _, host := newProver(t)
	silent := r.unproved(200)
	silent.authSend(0, host().Negotiate())
	if silent.await() {
		t.Fatal("a response to nothing")
	}
	refused := r.unproved(0)
	eager := host()
	refused.authSend(0, eager.Negotiate())
	refused.authSend(0, eager.Negotiate()) // again, instead of a Receive
	if _, err := eager.Next(refused.authReceive()); err == nil || !strings.Contains(err.Error(), "a message came out of turn") {
		t.Errorf("%v", err)
	}
	began := time.Now()
	if refused.await() || time.Since(began) > patience/2 {
		t.Error("the connection does not end")
	}
}

// Commands of authentication are checked like others.
func TestAuthCommands(t *testing.T) {
	r, _, host := newProver(t)
	h := r.unproved(0)
	msg := host().Negotiate()
	var cmd nvme.Command
	for _, c := range []struct {
		name         string
		set          func()
		length, data int
		want         nvme.Status
	}{
		{"protocol", func() { cmd.SetAuthSend(72); cmd[43]++ }, 72, 72, nvme.StatusInvalidField},
		{"SPSP0", func() { cmd.SetAuthReceive(4096); cmd[41] = 0 }, 4096, 4096, nvme.StatusInvalidField},
		{"no length", func() { cmd.SetAuthSend(0) }, 0, 0, nvme.StatusInvalidField},
		{"length of the data", func() { cmd.SetAuthSend(72) }, 72, 71, nvme.StatusInvalidSGLDataLength},
		{"long", func() { cmd.SetAuthSend(4097) }, 4097, 4097, nvme.StatusInvalidField},
		{"huge", func() { cmd.SetAuthReceive(1 << 31) }, 0, 4096, nvme.StatusInvalidField},
	} {
		c.set()
		h.want(c.want|dnr, h.keyed(&cmd, c.data))
	}
	h.authSend(0, msg)
	cmd.SetAuthReceive(16)
	h.want(nvme.StatusInvalidField|dnr, h.keyed(&cmd, 16)) // the Challenge is longer

	// Neither on a queue of a host that needs no authentication.
	if err := r.subsys.SetHostAuth(hostNQN, nil); err != nil {
		t.Fatal(err)
	}
	free := r.admin(testNQN)
	free.authSend(nvme.StatusInvalidOpcode|dnr, msg)
}

// Only a host whose keys the target has, or that is admitted without, may connect.
func TestAuthAdmits(t *testing.T) {
	r, a, _ := newProver(t)
	const keyed = "nqn.2026-01.org.example:keyed"
	if err := r.subsys.SetHostAuth(keyed, a); err != nil {
		t.Fatal(err)
	}
	if r.subsys.allows("nqn.2026-01.org.example:stranger") || !r.subsys.allows(hostNQN) || !r.subsys.allows(keyed) {
		t.Error("the wrong hosts are admitted")
	}
	for nqn, a := range map[string]*HostAuth{"": a, hostNQN: {}} {
		if r.subsys.SetHostAuth(nqn, a) == nil {
			t.Errorf("%q, %v: accepted", nqn, a)
		}
	}
}
