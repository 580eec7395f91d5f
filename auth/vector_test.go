package auth

import (
	"crypto/sha256"
	"encoding/hex"
	"math/big"
	"testing"
)

// Names, keys and numbers of the vectors, which were computed by another program.
const (
	vectorHost    = "nqn.2014-08.org.nvmexpress:uuid:00112233-4455-6677-8899-aabbccddeeff"
	vectorSubsys  = "nqn.2026-01.io.example:subsys1"
	vectorHostKey = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"
	vectorCtrlKey = "DHHC-1:02://79/Pv6+fj39vX08/Lx8O/u7ezr6uno5+bl5OPi4eDf3t3c29rZ2NfW1dTT0tHQOoWwEQ==:"
	vectorTID     = 5
	vectorS1      = 0x01020304
	vectorS2      = 0x0a0b0c0d
)

func mustKey(t testing.TB, text string) *Key {
	t.Helper()
	k, err := ParseKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// ramp returns n bytes that count up from first.
func ramp(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func TestBoundKeys(t *testing.T) {
	for _, c := range []struct{ key, nqn, want string }{
		{vectorHostKey, vectorHost, "28d14f536e0964e21224259a3a12ef423511b493944c6262f893c083c5f7baca"},
		{vectorCtrlKey, vectorSubsys, "e40cb9194d4030f2fce8cce4d19e29049676d6d5198e9dd0647a600eddf18cdfe0c317733774312cf5bc4215a8574465"},
	} {
		if got := hex.EncodeToString(mustKey(t, c.key).Bound(c.nqn)); got != c.want {
			t.Errorf("%s for %s: %s, want %s", c.key, c.nqn, got, c.want)
		}
	}
}

func TestResponses(t *testing.T) {
	host, ctrl := mustKey(t, vectorHostKey).Bound(vectorHost), mustKey(t, vectorCtrlKey).Bound(vectorSubsys)
	shared := func() []byte {
		s, err := exchangeOf(FFDHE2048, ramp(0x01, 32)).shared(exchangeOf(FFDHE2048, ramp(0x21, 32)).public)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}()
	for _, c := range []struct {
		hash   Hash
		shared []byte
		r1, r2 string
	}{
		{SHA256, nil, "b5f54d5476536543a9a1a97605aff005d44fbef3c22f274bc8900633f7d21bec", "4da3127cf8adcb390a043249441a9902e07c2912bc59452115fe149891f223ca"},
		{SHA384, nil, "dde5dc19069d094325aa374e0ba907e66ff6c6d79f1caf998e17fa660d1cf162fd6a8436b98f1a0f283c183973eaf02b", ""},
		{SHA512, nil, "803f7b0f96caa7b41c81d744a26a0ce8dfb86eb5563078186bf6c1940775317553b218e8435fbf0b8ad480edddba265963c4cff2a1daa908cc776bd30df0b501", ""},
		{SHA256, shared, "d0d3493b4da153d0f18dcfd74f74d1ac155f6762f212653f77428b8adf08701e", "10484566e21c796051479bc2e8849e7f8ef397ba0db4644f8ec0242afce2b96e"},
	} {
		r := newRun(c.hash, vectorTID, c.shared)
		r1 := r.response(host, ramp(0x10, c.hash.Size()), vectorS1, hostRole, vectorHost, vectorSubsys)
		if got := hex.EncodeToString(r1); got != c.r1 {
			t.Errorf("%v, %d shared bytes: R1 %s, want %s", c.hash, len(c.shared), got, c.r1)
		}
		r2 := r.response(ctrl, ramp(0x80, c.hash.Size()), vectorS2, controllerRole, vectorSubsys, vectorHost)
		if got := hex.EncodeToString(r2); c.r2 != "" && got != c.r2 {
			t.Errorf("%v, %d shared bytes: R2 %s, want %s", c.hash, len(c.shared), got, c.r2)
		}
	}
	if got, want := hex.EncodeToString(SHA256.sum(shared)), "ea34983e3388791628eeb66cdaaeec59ea660dc0939e0f3be18c3a71d0494eab"; got != want {
		t.Errorf("session key %s, want %s", got, want)
	}
}

// The primes are those of RFC 7919, by their hashes, and safe: p and (p-1)/2 are prime.
func TestPrimes(t *testing.T) {
	for g, want := range map[Group]string{
		FFDHE2048: "9cd3b7f336872f46c09428d1bbc19877a4d440512cda8d1c1cf0cd6e33698966",
		FFDHE3072: "0eaf67db3a839156d5013494a5318a772b5697d270d721f37f092efc69ea5a17",
		FFDHE4096: "4648414224ac881b3d0dc59b466f96d06a558278776807797ecf1f66ff397b3e",
		FFDHE6144: "227ac9066b3ddd9e193670cda2388fa884f65ba0cf98b742d1fe77a6687c79c7",
		FFDHE8192: "770b14efaf6f049929c523113b3fa99a8d11dab1b18af3609590122075d19833",
	} {
		p := groups[g].prime()
		sum := sha256.Sum256(p.Bytes())
		if got := hex.EncodeToString(sum[:]); got != want || (p.BitLen()+7)/8 != g.Size() {
			t.Errorf("%v: %d bits, hash %s, want %s", g, p.BitLen(), got, want)
		}
	}
	p := groups[FFDHE2048].prime()
	// The first and the last words in RFC 7919, A.1.
	if head, tail := hex.EncodeToString(p.Bytes()[:24]), hex.EncodeToString(p.Bytes()[240:]); head != "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1" || tail != "886b423861285c97ffffffffffffffff" {
		t.Errorf("ffdhe2048 begins with %s and ends with %s", head, tail)
	}
	if q := new(big.Int).Rsh(p, 1); !p.ProbablyPrime(1) || !q.ProbablyPrime(1) {
		t.Error("ffdhe2048 is not a safe prime")
	}
}

func TestPublicValues(t *testing.T) {
	for first, want := range map[byte]string{
		0x01: "53b37a098c5882b9f56495d787706d354ac8ebc273e680a7047c70228ce24ad3",
		0x21: "1651206066d764fd34f0510ee160a7b4e1d919de5c851fc4fc6cbee34ce87cd0",
	} {
		sum := sha256.Sum256(exchangeOf(FFDHE2048, ramp(first, 32)).public)
		if got := hex.EncodeToString(sum[:]); got != want {
			t.Errorf("public value of %02x…: %s, want %s", first, got, want)
		}
	}
}
