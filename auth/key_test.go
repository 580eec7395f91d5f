package auth

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestParseKey(t *testing.T) {
	const good = "ia6zGodOr4SEG0Zzaw398rpY0wqipUWj4jWjUh4HWUz6aQ2n"
	for _, c := range []struct{ text, want string }{
		{"DHHC-1:00:" + good + ":", ""},
		{vectorHostKey, ""},
		{vectorCtrlKey, ""},
		{"DHHC-1:00:Jc/My1o0qtLCWRp+sHhAVafdfaS7YQOMYhk9zSmlatobqB8C:", "checksum does not match"}, // of blktests nvme/044
		{"", "the prefix DHHC-1: is missing"},
		{"DHHC-2:00:" + good + ":", "the prefix DHHC-1: is missing"},
		{"DHHC-1:00:" + good, "want DHHC-1:hh:BASE64:"},
		{"DHHC-1:00:" + good + "::", "want DHHC-1:hh:BASE64:"},
		{"DHHC-1:00:" + good + ":x", "want DHHC-1:hh:BASE64:"},
		{"DHHC-1:04:" + good + ":", "not 00, 01, 02 or 03"},
		{"DHHC-1:0:" + good + ":", "not 00, 01, 02 or 03"},
		{"DHHC-1:1:" + good + ":", "not 00, 01, 02 or 03"},
		{"DHHC-1:00:::", "want DHHC-1:hh:BASE64:"},
		{"DHHC-1:00::", "the secret is missing"},
		{"DHHC-1:00:!" + good[1:] + ":", "not base64"},
		{"DHHC-1:00:" + good[:20] + "\n" + good[20:] + ":", "not base64"},
		{"DHHC-1:00:" + good[:8] + ":", "secret of 2 bytes; want 32, 48 or 64"},
	} {
		k, err := ParseKey(c.text)
		switch {
		case c.want == "":
			if err != nil || k.Text() != c.text {
				t.Errorf("%s: %v", c.text, err)
			}
		case err == nil || !strings.Contains(err.Error(), c.want):
			t.Errorf("%s: %v, want an error with %q", c.text, err, c.want)
		case strings.Contains(err.Error(), good[:8]):
			t.Errorf("%s: the error has the secret: %v", c.text, err)
		}
	}
}

func TestGenerateKey(t *testing.T) {
	for _, h := range append(Hashes(), NoHash) {
		for _, n := range []int{32, 48, 64} {
			k, err := GenerateKey(h, n)
			if err != nil {
				t.Fatal(err)
			}
			if same := mustKey(t, k.Text()); !same.Equal(k) || same.Size() != n || same.Transform() != h {
				t.Errorf("%v of %d bytes: %v", h, n, same)
			}
			if other, _ := GenerateKey(h, n); other.Equal(k) {
				t.Error("two keys are equal")
			}
		}
	}
	for _, n := range []int{-1, 0, 31, 33, 65, 1 << 40} {
		if _, err := GenerateKey(NoHash, n); err == nil {
			t.Errorf("a key of %d bytes", n)
		}
	}
	if _, err := GenerateKey(4, 32); err == nil {
		t.Error("a key with transformation 4")
	}
}

// Neither fmt nor slog nor encoding/json shows a secret, however it is wrapped.
func TestKeysAreSilent(t *testing.T) {
	k, err := NewKey(SHA256, []byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&out, nil))
	log.Info("key", "pointer", k, "value", *k, "inside", struct{ Key *Key }{k})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+verb+verb+verb, k, *k, struct{ Key *Key }{k}, []Key{*k})
	}
	if text, err := json.Marshal(struct{ Key *Key }{k}); err == nil {
		out.Write(text)
	}
	for _, secret := range []string{"0123456789", "30313233", "48 49 50", "MDEyMzQ1"} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("%s is in %s", secret, out.String())
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(vectorHostKey)
	f.Add(vectorCtrlKey)
	f.Add("DHHC-1:00::")
	f.Fuzz(func(t *testing.T, text string) {
		if k, err := ParseKey(text); err == nil && k.Text() != text {
			t.Errorf("%q is encoded as %q", text, k.Text())
		}
	})
}
