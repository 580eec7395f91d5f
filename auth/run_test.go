package auth

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
)

const (
	hostNQN = "nqn.2026-01.org.example:host"
	subNQN  = "nqn.2026-01.org.example:disk"
)

// pair is a host and a controller, with what an attacker or an error does to their messages.
type pair struct {
	host HostConfig
	ctrl ControllerConfig
	edit func(k Kind, msg []byte) []byte // nil: nothing
}

func newPair(t testing.TB, twoWay bool) *pair {
	t.Helper()
	key := func(h Hash) *Key {
		k, err := GenerateKey(h, 32)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	p := &pair{host: HostConfig{HostNQN: hostNQN, SubNQN: subNQN, Key: key(SHA256), Transaction: 7}}
	p.ctrl = ControllerConfig{HostNQN: hostNQN, SubNQN: subNQN, Key: p.host.Key}
	if twoWay {
		p.host.ControllerKey = key(NoHash)
		p.ctrl.ControllerKey = p.host.ControllerKey
	}
	return p
}

// run runs the protocol to its end.
func (p *pair) run(t testing.TB) (*Host, *Controller, error) {
	t.Helper()
	h, err := NewHost(p.host)
	if err != nil {
		t.Fatal(err)
	}
	c := NewController(p.ctrl)
	pass := func(msg []byte) []byte {
		if k, _, err := kindOf(msg); p.edit != nil && err == nil {
			return p.edit(k, bytes.Clone(msg))
		}
		return msg
	}
	for msg := h.Negotiate(); ; {
		c.Take(pass(msg))
		if h.Authenticated() {
			return h, c, nil
		}
		room := make([]byte, MaxMessage)
		copy(room, pass(c.Give()))
		out, err := h.Next(room)
		if err != nil {
			if out != nil {
				c.Take(pass(out))
			}
			return h, c, err
		}
		if out == nil {
			return h, c, nil
		}
		msg = out
	}
}

func TestAllMethods(t *testing.T) {
	for _, twoWay := range []bool{false, true} {
		for _, hash := range Hashes() {
			for _, group := range Groups() {
				t.Run(fmt.Sprintf("%v/%v/%t", hash, group, twoWay), func(t *testing.T) {
					p := newPair(t, twoWay)
					p.ctrl.Hashes, p.ctrl.Groups = []Hash{hash}, []Group{group}
					h, c, err := p.run(t)
					if err != nil || !h.Authenticated() || !c.Authenticated() || !c.Finished() || c.Err() != nil {
						t.Fatalf("%v; controller: %v", err, c.Err())
					}
					for _, m := range []interface{ Method() (Hash, Group) }{h, c} {
						if gotHash, gotGroup := m.Method(); gotHash != hash || gotGroup != group {
							t.Errorf("%v, %v", gotHash, gotGroup)
						}
					}
				})
			}
		}
	}
}

// The controller takes what it likes best of what is offered.
func TestChoice(t *testing.T) {
	p := newPair(t, false)
	p.host.Hashes, p.host.Groups = []Hash{SHA256, SHA384}, []Group{Null, FFDHE3072, FFDHE2048}
	h, _, err := p.run(t)
	if hash, group := h.Method(); err != nil || hash != SHA384 || group != FFDHE3072 {
		t.Errorf("%v, %v, %v", hash, group, err)
	}
}

// bigEndian returns n as a public value of FFDHE2048.
func bigEndian(n *big.Int) []byte { return n.FillBytes(make([]byte, FFDHE2048.Size())) }

func TestRefusals(t *testing.T) {
	p2048 := groups[FFDHE2048].prime()
	other, err := GenerateKey(NoHash, 64)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(which Kind, at int) func(*pair) {
		return func(p *pair) {
			p.edit = func(k Kind, msg []byte) []byte {
				if k == which {
					msg[at] ^= 1
				}
				return msg
			}
		}
	}
	cut := func(which Kind, n int) func(*pair) {
		return func(p *pair) {
			p.edit = func(k Kind, msg []byte) []byte {
				if k == which {
					return msg[:len(msg)-n]
				}
				return msg
			}
		}
	}
	set := func(which Kind, at int, b ...byte) func(*pair) {
		return func(p *pair) {
			p.edit = func(k Kind, msg []byte) []byte {
				if k == which {
					copy(msg[at:], b)
				}
				return msg
			}
		}
	}
	const public = headerSize + 64 // of a Challenge with SHA512
	for _, c := range []struct {
		name   string
		change func(*pair)
		want   string // in the host's error
	}{
		{"wrong host key", func(p *pair) { p.host.Key = other }, "the controller refuses: authentication failed: it has another host key"},
		{"wrong controller key", func(p *pair) { p.host.ControllerKey = other }, "the host refuses: authentication failed: the controller has another controller key"},
		{"keys swapped", func(p *pair) { p.host.Key, p.host.ControllerKey = p.host.ControllerKey, p.host.Key }, "the controller refuses: authentication failed"},
		{"no controller key", func(p *pair) { p.ctrl.ControllerKey = nil }, "the controller refuses: authentication failed: it has another host key, or no controller key"},
		{"another host name", func(p *pair) { p.host.HostNQN += "x" }, "the controller refuses: authentication failed"},
		{"another subsystem", func(p *pair) { p.ctrl.SubNQN += "x" }, "the controller refuses: authentication failed"},
		{"no common hash", func(p *pair) { p.host.Hashes, p.ctrl.Hashes = []Hash{SHA256}, []Hash{SHA512} }, "the controller refuses: the hash is not usable"},
		{"no common group", func(p *pair) { p.host.Groups, p.ctrl.Groups = []Group{FFDHE2048}, []Group{Null} }, "the controller refuses: the Diffie-Hellman group is not usable"},
		{"hash not offered", func(p *pair) {
			p.host.Hashes = []Hash{SHA512}
			set(Challenge, 6, 32, 0, uint8(SHA256))(p)
		}, "the host refuses: the hash is not usable: the controller chose sha256, which was not offered"},
		{"unknown hash", set(Challenge, 8, 9), "the controller chose hash 9, which was not offered"},
		{"group not offered", func(p *pair) {
			p.host.Groups = []Group{FFDHE2048, FFDHE3072}
			set(Challenge, 9, uint8(Null), 0, 0)(p)
		}, "the host refuses: the Diffie-Hellman group is not usable: the controller chose null, which was not offered"},
		{"unknown group", set(Challenge, 9, 77), "the controller chose group 77, which was not offered"},
		{"downgrade to one way", set(Success1, 8, 0), "the host refuses: authentication failed: the controller does not prove that it has the controller key"},
		{"no proof asked", set(Reply, 8, 0), "the host refuses: authentication failed: the controller does not prove that it has the controller key"},
		{"forged R1", flip(Reply, headerSize), "the controller refuses: authentication failed"},
		{"forged R2", flip(Success1, headerSize), "the host refuses: authentication failed: the controller has another controller key"},
		{"changed C1", flip(Challenge, headerSize), "the controller refuses: authentication failed"},
		{"changed S1", flip(Challenge, 12), "the controller refuses: authentication failed"},
		{"changed C2", flip(Reply, headerSize+64), "the host refuses: authentication failed"},
		{"S2 is 0", set(Reply, 12, 0, 0, 0, 0), "the controller refuses: a message has an incorrect payload"},
		{"another T_ID in Challenge", flip(Challenge, 4), "the host refuses: a message has an incorrect payload: Challenge of transaction 6, not 7"},
		{"another T_ID in Reply", flip(Reply, 4), "the controller refuses: a message has an incorrect payload"},
		{"another T_ID in Success1", flip(Success1, 4), "the host refuses: a message has an incorrect payload: Success1 of transaction 6, not 7"},
		{"secure channel", set(Negotiate, 6, 1), "the controller refuses: the secure channel does not match"},
		{"unknown protocol", set(Negotiate, 8, 2), "the controller refuses: the authentication protocol is not usable"},
		{"no protocol", set(Negotiate, 7, 0), "the controller refuses: a message has an incorrect payload"},
		{"too many hashes", set(Negotiate, 10, 31), "the controller refuses: a message has an incorrect payload"},
		{"truncated Negotiate", cut(Negotiate, 1), "the controller refuses: a message has an incorrect payload"},
		{"truncated Reply", cut(Reply, 1), "the controller refuses: a message has an incorrect payload"},
		{"almost nothing of a Reply", cut(Reply, headerSize+2*64+256-5), "the controller refuses: a message has an incorrect payload"},
		{"almost nothing of a Negotiate", cut(Negotiate, negotiateSize-failureSize), "the controller refuses: a message has an incorrect payload"},
		{"not even the header of a Negotiate", cut(Negotiate, negotiateSize-failureSize+1), "the controller refuses: a message has an incorrect payload"},
		{"no header of a Reply", cut(Reply, headerSize+2*64+256-failureSize+1), "the controller refuses: a message has an incorrect payload"},
		{"Reply without R1", cut(Reply, 2*64+256), "the controller refuses: a message has an incorrect payload"},
		{"Reply without C2", cut(Reply, 64+256), "the controller refuses: a message has an incorrect payload"},
		{"Reply without a public value", cut(Reply, 256), "the controller refuses: a message has an incorrect payload"},
		{"truncated Challenge", cut(Challenge, 1), "the controller refuses: authentication failed"},
		{"Challenge without a message", func(p *pair) {
			p.edit = func(k Kind, msg []byte) []byte {
				if k == Challenge {
					return nil
				}
				return msg
			}
		}, "the host refuses"},
		{"HL lies", set(Challenge, 6, 63), "the host refuses: a message has an incorrect payload"},
		{"DHVLEN lies", set(Challenge, 10, 0xff, 0xff), "the host refuses: a message has an incorrect payload"},
		{"DHVLEN lies in Reply", set(Reply, 10, 4), "the controller refuses: a message has an incorrect payload"},
		{"HL lies in Success1", set(Success1, 6, 200), "the host refuses: a message has an incorrect payload"},
		{"public value 0", set(Challenge, public, make([]byte, 256)...), "the host refuses: a message has an incorrect payload: the public value is not in the range"},
		{"public value 1", set(Challenge, public, bigEndian(big.NewInt(1))...), "not in the range"},
		{"public value p-1", set(Challenge, public, bigEndian(new(big.Int).Sub(p2048, big.NewInt(1)))...), "not in the range"},
		{"public value p", set(Challenge, public, bigEndian(p2048)...), "not in the range"},
		{"host's public value 0", set(Reply, headerSize+128, make([]byte, 256)...), "the controller refuses: a message has an incorrect payload"},
		{"message out of turn", set(Reply, 1, 0x04), "the controller refuses: a message came out of turn"},
		{"Success1 instead of Challenge", set(Challenge, 1, 0x03), "the host refuses: a message came out of turn: Success1"},
		{"unknown message", set(Challenge, 0, 9, 9), "the host refuses: a message came out of turn: message 09h.09h"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, true)
			p.ctrl.Groups = []Group{FFDHE2048}
			c.change(p)
			h, ctrl, err := p.run(t)
			var refused *Error
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if h.Authenticated() || ctrl.Authenticated() {
				t.Errorf("authenticated: host %t, controller %t", h.Authenticated(), ctrl.Authenticated())
			}
			if ctrl.Err() == nil || !ctrl.Finished() {
				t.Errorf("the controller does not know: %v, finished %t", ctrl.Err(), ctrl.Finished())
			}
			if _, err := h.Next(encodeSuccess2(7)); err == nil {
				t.Error("the host goes on after an error")
			}
		})
	}
}

// A Success2 that is not whole does not admit the host.
func TestTruncatedSuccess2(t *testing.T) {
	p := newPair(t, true)
	p.ctrl.Groups = []Group{Null}
	p.edit = func(k Kind, msg []byte) []byte {
		if k == Success2 {
			return msg[:headerSize-1]
		}
		return msg
	}
	_, c, err := p.run(t)
	if err != nil || c.Authenticated() || c.Due() != Failure1 {
		t.Fatalf("%v; authenticated %t, %v is due", err, c.Authenticated(), c.Due())
	}
	if c.Give(); c.Err() == nil || c.Err().Reason != IncorrectPayload || !c.Finished() {
		t.Errorf("%v", c.Err())
	}
}

// A controller says which message is due, up to the next run.
func TestDue(t *testing.T) {
	p := newPair(t, true)
	c := NewController(p.ctrl)
	h, err := NewHost(p.host)
	if err != nil {
		t.Fatal(err)
	}
	due := []Kind{c.Due()}
	for msg := h.Negotiate(); msg != nil; {
		c.Take(msg)
		due = append(due, c.Due())
		if h.Authenticated() {
			break
		}
		if msg, err = h.Next(c.Give()); err != nil {
			t.Fatal(err)
		}
		due = append(due, c.Due())
	}
	if want := []Kind{Negotiate, Challenge, Reply, Success1, Success2, Negotiate}; !slices.Equal(due, want) {
		t.Errorf("due %v, want %v", due, want)
	}
}

// What one run said is worth nothing in another one.
func TestReplay(t *testing.T) {
	p := newPair(t, true)
	p.ctrl.Groups = []Group{Null} // the harder case
	said := map[Kind][]byte{}
	p.edit = func(k Kind, msg []byte) []byte {
		said[k] = msg
		return msg
	}
	if _, _, err := p.run(t); err != nil {
		t.Fatal(err)
	}
	for k, by := range map[Kind]Side{Reply: ControllerSide, Challenge: HostSide, Success1: HostSide} {
		p.edit = func(now Kind, msg []byte) []byte {
			if now == k {
				return said[k]
			}
			return msg
		}
		_, c, err := p.run(t)
		var refused *Error
		if !errors.As(err, &refused) {
			t.Errorf("%v replayed: %v", k, err)
		}
		if c.Authenticated() {
			t.Errorf("%v replayed: the controller admits the host (%v, expected from %v)", k, err, by)
		}
	}
}

// A controller that gives the host its own challenge back learns no response to it.
func TestReflection(t *testing.T) {
	p := newPair(t, true)
	p.host.ControllerKey = p.host.Key // careless
	h, err := NewHost(p.host)
	if err != nil {
		t.Fatal(err)
	}
	h.Negotiate()
	first := question{SHA256, Null, 1, make([]byte, 32), nil}
	out, err := h.Next(first.encode(7))
	if err != nil {
		t.Fatal(err)
	}
	asked, err := decodeAnswer(out, 32, 0)
	if err != nil {
		t.Fatal(err)
	}
	second, err := NewHost(p.host)
	if err != nil {
		t.Fatal(err)
	}
	second.Negotiate()
	out, err = second.Next(question{SHA256, Null, asked.sequence, asked.challenge, nil}.encode(7))
	if err != nil {
		t.Fatal(err)
	}
	reflected, err := decodeAnswer(out, 32, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Next(proof{true, reflected.response}.encode(7)); err == nil {
		t.Error("the host takes its own response for that of the controller")
	}
}

func TestBadConfig(t *testing.T) {
	for _, change := range []func(*HostConfig){
		func(c *HostConfig) { c.Key = nil },
		func(c *HostConfig) { c.HostNQN = "" },
		func(c *HostConfig) { c.SubNQN = "" },
		func(c *HostConfig) { c.Hashes = []Hash{} },
		func(c *HostConfig) { c.Hashes = []Hash{NoHash} },
		func(c *HostConfig) { c.Groups = []Group{} },
		func(c *HostConfig) { c.Groups = []Group{6} },
	} {
		p := newPair(t, false)
		change(&p.host)
		if _, err := NewHost(p.host); err == nil {
			t.Errorf("%+v is accepted", p.host)
		}
	}
}

// FuzzHost: whatever a controller says, the host does not panic and does not take it for
// authenticated.
func FuzzHost(f *testing.F) {
	key, err := NewKey(NoHash, make([]byte, 32))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(question{SHA256, Null, 1, make([]byte, 32), nil}.encode(7), proof{true, make([]byte, 32)}.encode(7))
	f.Add(question{SHA512, FFDHE2048, 1, make([]byte, 64), exchangeOf(FFDHE2048, ramp(1, 32)).public}.encode(7), proof{}.encode(7))
	f.Add(encodeFailure(Failure1, 7, Failed), []byte{})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		h, err := NewHost(HostConfig{HostNQN: hostNQN, SubNQN: subNQN, Key: key, ControllerKey: key, Groups: []Group{Null, FFDHE2048}, Transaction: 7})
		if err != nil {
			t.Fatal(err)
		}
		h.Negotiate()
		for _, msg := range [][]byte{first, second} {
			if _, err := h.Next(msg); err != nil && h.Authenticated() {
				t.Fatal("authenticated after an error")
			}
		}
		if h.Authenticated() {
			t.Fatal("authenticated without the key")
		}
	})
}

// FuzzController: whatever a host says, the controller does not panic and does not admit it.
func FuzzController(f *testing.F) {
	key, err := GenerateKey(NoHash, 32)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(offer{protocol: 1, hashes: Hashes(), groups: Groups()}.encode(7), answer{response: make([]byte, 32), challenge: make([]byte, 32), asks: true, sequence: 1}.encode(7), encodeSuccess2(7))
	f.Add(offer{protocol: 1, hashes: Hashes(), groups: Groups()}.encode(7), encodeFailure(Failure2, 7, Failed), []byte{})
	f.Fuzz(func(t *testing.T, first, second, third []byte) {
		c := NewController(ControllerConfig{HostNQN: hostNQN, SubNQN: subNQN, Key: key, ControllerKey: key, Hashes: []Hash{SHA256}, Groups: []Group{Null}})
		for _, msg := range [][]byte{first, second, third} {
			c.Take(msg)
			if len(c.Give()) < failureSize {
				t.Fatal("a message is too short")
			}
			if c.Authenticated() {
				t.Fatal("authenticated without the key")
			}
		}
	})
}

// FuzzDecode: what is decoded is encoded to the same bytes, as far as they mean something.
func FuzzDecode(f *testing.F) {
	f.Add(offer{protocol: 1, hashes: Hashes(), groups: Groups()}.encode(7))
	f.Add(question{SHA256, Null, 1, make([]byte, 32), nil}.encode(7))
	f.Add(answer{response: make([]byte, 32), challenge: make([]byte, 32), asks: true, sequence: 1}.encode(7))
	f.Add(proof{true, make([]byte, 32)}.encode(7))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, tid, err := kindOf(b)
		if err != nil {
			return
		}
		if o, err := decodeOffer(b); err == nil {
			again, err := decodeOffer(o.encode(tid))
			if err != nil || fmt.Sprint(again) != fmt.Sprint(o) {
				t.Errorf("%v became %v, %v", o, again, err)
			}
		}
		if q, err := decodeQuestion(b); err == nil {
			again, err := decodeQuestion(q.encode(tid))
			if err != nil || fmt.Sprint(again) != fmt.Sprint(q) {
				t.Errorf("%v became %v, %v", q, again, err)
			}
		}
		if a, err := decodeAnswer(b, 32, 0); err == nil {
			again, err := decodeAnswer(a.encode(tid), 32, 0)
			if err != nil || fmt.Sprint(again) != fmt.Sprint(a) {
				t.Errorf("%v became %v, %v", a, again, err)
			}
		}
		if p, err := decodeProof(b, 32); err == nil && p.valid {
			again, err := decodeProof(p.encode(tid), 32)
			if err != nil || fmt.Sprint(again) != fmt.Sprint(p) {
				t.Errorf("%v became %v, %v", p, again, err)
			}
		}
	})
}

func BenchmarkRun(b *testing.B) {
	for _, g := range Groups() {
		b.Run(g.String(), func(b *testing.B) {
			p := newPair(b, true)
			p.ctrl.Groups = []Group{g}
			for b.Loop() {
				if _, _, err := p.run(b); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
