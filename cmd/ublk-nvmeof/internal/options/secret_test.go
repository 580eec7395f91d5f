package options

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/target"
)

// newKeyFile makes a key and a file that has it.
func newKeyFile(t *testing.T) (*auth.Key, string) {
	t.Helper()
	k, err := auth.GenerateKey(auth.NoHash, 32)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("\n "+k.Text()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return k, file
}

func TestSecretSources(t *testing.T) {
	k, file := newKeyFile(t)
	for _, value := range []string{k.Text(), "@" + file} {
		c, f, err := parse(t, "-S", value, "--dhchap-ctrl-secret="+value)
		if err != nil || !c.Secret.Equal(k) || !c.ControllerSecret.Equal(k) {
			t.Errorf("%s: %v", value, err)
			continue
		}
		if args := strings.Join(Args(f), " "); strings.Contains(args, "DHHC") || strings.Contains(args, "dhchap") {
			t.Errorf("arguments %q", args)
		}
	}
	if c, _, err := parse(t, "-S", "none"); err != nil || c.Secret != nil {
		t.Errorf("none: %v", err)
	}
	long := filepath.Join(t.TempDir(), "long")
	if err := os.WriteFile(long, make([]byte, maxSecretFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"/nonexistent/key": "no such file", long: "longer than 4.0 KiB", os.DevNull: "/dev/null is empty"} {
		if _, err := ParseSecret("@" + file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
	c, _, err := parse(t, "-a", "10.0.0.1", "-n", "nqn.a", "-C", k.Text())
	if err == nil {
		err = c.Complete(identity.Sources{})
	}
	if err == nil || !strings.Contains(err.Error(), "-C/--dhchap-ctrl-secret: want -S/--dhchap-secret as well") {
		t.Errorf("a controller key alone: %v", err)
	}
}

// No way of giving a key leaves it in the arguments of another process.
func TestHideSecrets(t *testing.T) {
	k, file := newKeyFile(t)
	for _, tt := range []struct {
		args, want []string
		texts      int
	}{
		{[]string{"-S" + k.Text(), "-a", "x"}, []string{"-S@/proc/self/fd/4", "-a", "x"}, 1},
		{[]string{"-S", k.Text()}, []string{"-S", "@/proc/self/fd/4"}, 1},
		{[]string{"--dhchap-secret=" + k.Text(), "--dhchap-ctrl-secret", k.Text()}, []string{"--dhchap-secret=@/proc/self/fd/4", "--dhchap-ctrl-secret", "@/proc/self/fd/4"}, 1},
		{[]string{"-S", "@" + file, "-C", "none"}, []string{"-S", "@" + file, "-C", "none"}, 0},
	} {
		d := DefaultDiscovery()
		if err := d.Flags().Parse(tt.args); err != nil {
			t.Fatal(err)
		}
		hidden, texts := HideSecrets(d.Flags(), tt.args, 4)
		if !slices.Equal(hidden, tt.want) || len(texts) < tt.texts {
			t.Errorf("%q: %q, %d texts", tt.args, hidden, len(texts))
		}
		for _, text := range texts {
			if text != k.Text() {
				t.Error("another key is handed over")
			}
		}
	}
}

// What files name inherits the keys of the command line, and may have others.
func TestDiscoverySecrets(t *testing.T) {
	k, file := newKeyFile(t)
	other, _ := newKeyFile(t)
	d := DefaultDiscovery()
	if err := d.Flags().Parse([]string{"-S", "@" + file}); err != nil {
		t.Fatal(err)
	}
	from := identity.Sources{}
	inherits, err := d.With([]string{"-a", "10.0.0.1"}, from)
	if err != nil || !inherits.Connect.Secret.Equal(k) {
		t.Errorf("inherited: %v", err)
	}
	has, err := d.With([]string{"-a", "10.0.0.1", "-S", other.Text()}, from)
	if err != nil || !has.Connect.Secret.Equal(other) {
		t.Errorf("its own: %v", err)
	}
	for _, d := range []*Discovery{inherits, has} {
		if args := strings.Join(d.ConnectArgs(netip.MustParseAddrPort("10.0.0.1:4420"), "nqn.a"), " "); strings.Contains(args, "DHHC") {
			t.Errorf("arguments %q", args)
		}
	}
}

// TestHostAuthChange: a change of one thing leaves the others as they are.
func TestHostAuthChange(t *testing.T) {
	k, file := newKeyFile(t)
	other, err := auth.GenerateKey(auth.NoHash, 32)
	if err != nil {
		t.Fatal(err)
	}
	change := func(have *target.HostAuth, args ...string) (*target.HostAuth, error) {
		t.Helper()
		var given HostAuth
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		AddHostAuthFlags(f, &given)
		if err := f.Parse(args); err != nil {
			t.Fatal(err)
		}
		text, err := given.Change(f)
		if strings.Contains(text.String(), "DHHC") {
			t.Error(text.String())
		}
		if err != nil {
			return nil, err
		}
		return text.Apply(have)
	}
	all, err := change(nil, "--dhchap-key", "@"+file, "--dhchap-ctrl-key", k.Text(), "--dhchap-hash", "sha512,sha256", "--dhchap-dhgroup", "null", "--dhchap-queues", "admin")
	if err != nil || !all.Key.Equal(k) || !all.ControllerKey.Equal(k) || len(all.Hashes) != 2 || len(all.Groups) != 1 || !all.AdminOnly {
		t.Fatalf("%+v, %v", all, err)
	}
	for flags, want := range map[string]func(*target.HostAuth){
		"--dhchap-dhgroup ffdhe2048":   func(a *target.HostAuth) { a.Groups = []auth.Group{auth.FFDHE2048} },
		"--dhchap-hash sha384":         func(a *target.HostAuth) { a.Hashes = []auth.Hash{auth.SHA384} },
		"--dhchap-queues all":          func(a *target.HostAuth) { a.AdminOnly = false },
		"--dhchap-ctrl-key none":       func(a *target.HostAuth) { a.ControllerKey = nil },
		"--dhchap-key " + other.Text(): func(a *target.HostAuth) { a.Key = other },
	} {
		expected := *all
		want(&expected)
		if got, err := change(all, strings.Fields(flags)...); err != nil || !got.Key.Equal(expected.Key) || (got.ControllerKey == nil) != (expected.ControllerKey == nil) ||
			!slices.Equal(got.Hashes, expected.Hashes) || !slices.Equal(got.Groups, expected.Groups) || got.AdminOnly != expected.AdminOnly {
			t.Errorf("%s: %+v, %v, want %+v", flags, got, err, expected)
		}
	}
	if got, err := change(all, "--dhchap-key", "none"); got != nil || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for flags, want := range map[string]string{
		"":                                      "nothing is given to change",
		"--dhchap-dhgroup ffdhe2048":            "the host has no key so far; want --dhchap-key",
		"--dhchap-key none --dhchap-queues all": "want it without other flags",
	} {
		if got, err := change(nil, strings.Fields(flags)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", flags, got, err)
		}
	}
}

func TestHostAuthFlags(t *testing.T) {
	k, file := newKeyFile(t)
	o, err := parseTarget("-n", "nqn.a", "--allow-host", "nqn.h", "--dhchap-key", "@"+file, "--allow-host", "nqn.i",
		"--dhchap-key", k.Text(), "--dhchap-ctrl-key", k.Text(), "--dhchap-hash", "sha512,sha256", "--dhchap-dhgroup", "null,ffdhe8192", "--dhchap-queues", "admin")
	if err != nil {
		t.Fatal(err)
	}
	a := o.Subsystems[0].Auth
	if len(a) != 2 || a[0].Host != "nqn.h" || !a[0].Key.Equal(k) || a[0].ControllerKey != nil || a[1].Host != "nqn.i" || !a[1].AdminOnly ||
		!slices.Equal(a[1].Hashes, []auth.Hash{auth.SHA512, auth.SHA256}) || !slices.Equal(a[1].Groups, []auth.Group{auth.Null, auth.FFDHE8192}) {
		t.Errorf("%+v", a)
	}
	for args, want := range map[string]string{
		"--dhchap-key @" + file:                           "want --nqn and --allow-host first",
		"--allow-host nqn.h --dhchap-ctrl-key @" + file:   "--dhchap-key: no value is given for host nqn.h",
		"--allow-host nqn.h --dhchap-key " + k.Text()[1:]: "--dhchap-key: key: the prefix DHHC-1: is missing",
		"--allow-host nqn.h --dhchap-hash md5":            "want one or more of sha256, sha384 or sha512",
		"--allow-host nqn.h --dhchap-dhgroup modp2048":    "want one or more of null, ffdhe2048",
		"--allow-host nqn.h --dhchap-queues io":           "want all or admin",
	} {
		if _, err := parseTarget(append([]string{"-n", "nqn.a"}, strings.Fields(args)...)...); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), k.Text()[1:]) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}
