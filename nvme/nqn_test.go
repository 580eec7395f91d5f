package nvme

import (
	"errors"
	"strings"
	"testing"
)

func TestValidateNQN(t *testing.T) {
	for _, good := range []string{
		DiscoveryNQN, "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001", "testnqn", "nqn.2024-01.com.example:жд",
		strings.Repeat("x", 223),
	} {
		if err := ValidateNQN(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", strings.Repeat("x", 224), "a\x00b", "a\xffb"} {
		if err := ValidateNQN(bad); !errors.Is(err, ErrInvalidNQN) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if len(DiscoveryNQN) != 36 {
		t.Errorf("discovery nqn of %d bytes", len(DiscoveryNQN))
	}
}

func TestWellFormedNQN(t *testing.T) {
	for s, want := range map[string]bool{
		DiscoveryNQN: true, "nqn.2024-01.com.example:disk:1": true, "nqn.2024-01.x": true,
		"": false, "testnqn": false, "nqn.2024-01.": false, "nqn.2024-1.com.example": false, "iqn.2024-01.com.example": false,
		"nqn.2024-01.:x": false, "nqn.20x4-01.com": false, "NQN.2024-01.com": false, "nqn.2024-01.com\x00": false,
	} {
		if got := WellFormedNQN(s); got != want {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestUUID(t *testing.T) {
	const s = "01020304-0506-0708-090a-0b0c0d0e0f10"
	want := UUID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	for _, in := range []string{s, strings.ToUpper(s)} {
		if got, err := ParseUUID(in); err != nil || got != want {
			t.Errorf("%q: %x, %v", in, got, err)
		}
	}
	if want.String() != s {
		t.Errorf("String() = %q", want.String())
	}
	if got := UUIDNQN(want); got != "nqn.2014-08.org.nvmexpress:uuid:"+s {
		t.Errorf("nqn %q", got)
	}
	for _, bad := range []string{
		"", s[1:], s + "0", "{" + s[1:35] + "}", strings.ReplaceAll(s, "-", ""), strings.Replace(s, "-", "0", 1),
		strings.Replace(s, "01", "0g", 1), strings.Replace(s, "05", "-5", 1), " " + s[:35],
	} {
		if got, err := ParseUUID(bad); err == nil || !got.IsZero() {
			t.Errorf("%q: %v, %v", bad, got, err)
		}
	}
	var u UUID
	if err := u.UnmarshalText([]byte(s)); err != nil || u != want {
		t.Errorf("unmarshal: %v, %v", u, err)
	}
	if err := u.UnmarshalText([]byte("x")); err == nil || u != want {
		t.Errorf("bad text: %v, %v", u, err)
	}
	if b, err := u.MarshalText(); err != nil || string(b) != s {
		t.Errorf("marshal: %q, %v", b, err)
	}
}

func TestNewUUID(t *testing.T) {
	seen := map[UUID]bool{}
	for range 100 {
		u := NewUUID()
		if u[6]>>4 != 4 || u[8]>>6 != 2 {
			t.Fatalf("%v is not version 4, variant 1", u)
		}
		if seen[u] {
			t.Fatalf("%v twice", u)
		}
		seen[u] = true
	}
}

// The example is that of RFC 9562, appendix A.4.
func TestNameUUID(t *testing.T) {
	dns, err := ParseUUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
	if err != nil {
		t.Fatal(err)
	}
	if got := NameUUID(dns, "www.example.com").String(); got != "2ed6657d-e927-568b-95e1-2665a8aea6a2" {
		t.Errorf("UUID %s", got)
	}
}
