package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/target"
)

const authNQN = "nqn.2026-01.org.example:secret"

// vault is a site whose target requires authentication, and files with the keys.
type vault struct {
	*site
	host, controller *auth.Key
	files            string // directory of host.key and ctrl.key
}

func newVault(t *testing.T) *vault {
	t.Helper()
	v := &vault{site: newSite(t, authNQN), files: t.TempDir()}
	v.put(authNQN, newDisk("x"))
	for name, k := range map[string]**auth.Key{"host.key": &v.host, "ctrl.key": &v.controller} {
		var err error
		if *k, err = auth.GenerateKey(auth.SHA256, 32); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(v.file(name), []byte((*k).Text()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	v.require(&target.HostAuth{Key: v.host, ControllerKey: v.controller, Groups: []auth.Group{auth.FFDHE2048}})
	return v
}

func (v *vault) require(a *target.HostAuth) {
	v.t.Helper()
	if err := v.subs[authNQN].SetHostAuth("nqn.2026-01.org.example:host", a); err != nil {
		v.t.Fatal(err)
	}
}

func (v *vault) file(name string) string { return filepath.Join(v.files, name) }

// noLeak looks for the keys where others could read them: in arguments and environments of
// all processes that use the run directory, and in its files.
func (v *vault) noLeak() {
	v.t.Helper()
	check := func(where string, text []byte) {
		for _, k := range []*auth.Key{v.host, v.controller} {
			if bytes.Contains(text, []byte(k.Text()[11:40])) {
				v.t.Errorf("a key is in %s", where)
			}
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		v.t.Fatal(err)
	}
	servers := 0
	for _, p := range processes {
		args, err := os.ReadFile(p + "/cmdline") // it may end meanwhile
		if err != nil || !bytes.Contains(args, []byte(v.dir)) {
			continue
		}
		servers++
		check(p+"/cmdline", args)
		environment, _ := os.ReadFile(p + "/environ")
		check(p+"/environ", environment)
	}
	if servers == 0 {
		v.t.Error("no server was looked at")
	}
	err = filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if d.Name() == "secrets.json" {
			if info, err := d.Info(); err != nil || info.Mode() != 0o600 {
				v.t.Errorf("%s: %v, %v", path, info.Mode(), err)
			}
			return nil
		}
		text, err := os.ReadFile(path)
		check(path, text)
		return err
	})
	if err != nil {
		v.t.Error(err)
	}
}

// TestKeysOfServer follows keys from the command line through a server, its death and
// its successor.
func TestKeysOfServer(t *testing.T) {
	v := newVault(t)
	r := v.connect(authNQN, "-S", v.host.Text(), "--dhchap-ctrl-secret=@"+v.file("ctrl.key"))
	v.noLeak()
	if out, _, _ := v.program("list", "-v"); !strings.Contains(out, "sha512, ffdhe2048, two-way") {
		t.Errorf("list: %s", out)
	}
	v.kill(r)
	if _, errs, code := v.program("recover", authNQN); code != exit.OK {
		t.Fatalf("recover: exit code %d, %s", code, errs)
	}
	v.noLeak()

	// With a new key at the target.
	next, err := auth.GenerateKey(auth.NoHash, 48)
	if err != nil {
		t.Fatal(err)
	}
	v.require(&target.HostAuth{Key: next, Groups: []auth.Group{auth.Null}})
	if _, errs, code := v.program("reauth", authNQN); code != exit.NotProved || !strings.Contains(errs, "reauth: authentication of queue 0: the controller refuses: authentication failed") {
		t.Errorf("reauth with the old key: exit code %d, %s", code, errs)
	}
	v.host = next
	if _, errs, code := v.program("reauth", authNQN, "-S", next.Text(), "-C", "none"); code != exit.OK {
		t.Errorf("reauth: exit code %d, %s", code, errs)
	}
	if out, _, _ := v.program("list", "-v"); !strings.Contains(out, "sha512, null, one-way") {
		t.Errorf("list: %s", out)
	}
	v.kill(v.record(authNQN))
	if _, errs, code := v.program("recover", authNQN); code != exit.OK {
		t.Errorf("recover: exit code %d, %s", code, errs)
	}
	v.noLeak()
	if _, errs, code := v.program("disconnect", "-n", authNQN); code != exit.OK {
		t.Errorf("disconnect: exit code %d, %s", code, errs)
	}
	if left, _ := filepath.Glob(v.dir + "/*/secrets.json"); len(left) > 0 {
		t.Errorf("keys are left: %q", left)
	}
}

// TestKeysOfOthers takes keys from a configuration, and from a descriptor, and gives them to
// a process that stays.
func TestKeysOfOthers(t *testing.T) {
	v := newVault(t)
	config := v.file("config.json")
	text := fmt.Sprintf(`[{"hostnqn": "nqn.2026-01.org.example:host", "subsystems": [{"nqn": %q, "ports": [{"transport": "rdma", "traddr": %q, "dhchap_key": "@%s", "dhchap_ctrl_key": %q}]}]}]`,
		authNQN, v.addr, v.file("host.key"), v.controller.Text())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := []string{"--provider", "roce", "--frontend", "nbd-socket", "-i", "1"}
	if _, errs, code := v.program(append([]string{"connect-all", "-J", config}, flags...)...); code != exit.OK {
		t.Fatalf("connect-all: exit code %d, %s", code, errs)
	}
	v.noLeak()
	v.program("disconnect", "-n", authNQN)

	// A service that requires authentication, whose keeper has to have the key as well.
	if err := v.target.Discovery().SetHostAuth("nqn.2026-01.org.example:host", &target.HostAuth{Key: v.host}); err != nil {
		t.Fatal(err)
	}
	flags = append(flags, "-a", v.addr.String(), "-q", "nqn.2026-01.org.example:host")
	if _, errs, code := v.program(append([]string{"connect-all"}, flags...)...); code != exit.NotProved || !strings.Contains(errs, "--dhchap-secret gives its key") {
		t.Errorf("without a key: exit code %d, %s", code, errs)
	}
	flags = append(flags, "-S", v.host.Text())
	if out, errs, code := v.program(append([]string{"connect-all", "--persistent"}, flags...)...); code != exit.OK || !strings.Contains(out, "stays connected") {
		t.Errorf("exit code %d, %s%s", code, out, errs)
	}
	v.noLeak()
	if out, errs, code := v.program("discover", "--provider", "roce", "-a", v.addr.String(), "-q", "nqn.2026-01.org.example:host", "-S", "@"+v.file("host.key")); code != exit.OK || !strings.Contains(out, authNQN) {
		t.Errorf("discover: exit code %d, %s%s", code, out, errs)
	}
	if out, _, _ := v.program("config", "show"); !strings.Contains(out, authNQN) || strings.Contains(out, "DHHC") {
		t.Errorf("config show: %s", out)
	}
	if _, errs, code := v.program("disconnect-all"); code != exit.OK {
		t.Errorf("disconnect-all: exit code %d, %s", code, errs)
	}
}

// TestKeyVerbs makes keys that are valid, the same as nvme-cli for the same secret, and
// refuses others without repeating them.
func TestKeyVerbs(t *testing.T) {
	run := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, args...)
	}
	for _, flags := range []string{"", "-l 48", "-l 64", "-m 1", "-m 2", "-m 3 -l 64"} {
		out, _, code := run(append([]string{"gen-dhchap-key"}, strings.Fields(flags)...)...)
		if _, err := auth.ParseKey(strings.TrimSpace(out)); err != nil || code != exit.OK {
			t.Errorf("%s: %v", flags, err)
		}
		if out, errs, code := run("check-dhchap-key", "--key", strings.TrimSpace(out)); code != exit.OK || !strings.HasPrefix(out, "Key is valid (HMAC ") {
			t.Errorf("%s: %s%s", flags, out, errs)
		}
	}
	// A secret that is given: as it is, and bound to a name once by the generator.
	const secret = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	if out, _, _ := run("gen-dhchap-key", "-s", secret); out != "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:\n" {
		t.Errorf("plain: %s", out)
	}
	k, err := auth.ParseKey("DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:")
	if err != nil {
		t.Fatal(err)
	}
	want, err := auth.NewKey(auth.SHA256, k.Bound("nqn.host"))
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := run("gen-dhchap-key", "-s", secret, "-m", "1", "-n", "nqn.host"); out != want.Text()+"\n" {
		t.Errorf("bound: %s", out)
	}
	for args, wrong := range map[string]string{
		"gen-dhchap-key -m 4":                                 `-m/--hmac "4": want 0, 1, 2 or 3`,
		"gen-dhchap-key -l 33":                                `-l/--key-length "33": want 32, 48 or 64`,
		"gen-dhchap-key -m 1 -l 48":                           "with --hmac the length of its hash",
		"gen-dhchap-key -m x":                                 `-m/--hmac "x": want 0, 1, 2 or 3`,
		"gen-dhchap-key -s 5ecre7":                            "want 64 hexadecimal digits",
		"gen-dhchap-key -s 00":                                "want 64 hexadecimal digits",
		"gen-dhchap-key -s " + secret + "20":                  "want 64 hexadecimal digits",
		"check-dhchap-key":                                    "-k/--key: no value is given; want",
		"check-dhchap-key -k none":                            "-k/--key: no value is given; want a key like DHHC-1:00:BASE64:, or @FILE for a file that contains one\n",
		"check-dhchap-key -k @/dev/null":                      "-k/--key: /dev/null is empty; want",
		"target -n nqn.a --min-cntlid 9 --max-cntlid 3":       `--min-cntlid "9": want at most --max-cntlid, 3`,
		"check-dhchap-key -k 5ecre7":                          "-k/--key: key: the prefix DHHC-1: is missing",
		"check-dhchap-key -k @/nonexistent":                   "no such file",
		"connect -a 10.0.0.1 -n nqn.a -S 5ecre7":              "-S/--dhchap-secret: key: the prefix DHHC-1: is missing",
		"connect -a 10.0.0.1 -n nqn.a --dhchap-secret=5ecre7": "-S/--dhchap-secret: key: the prefix DHHC-1: is missing",
		"reauth ctrl0 -C DHHC-1:00:5ecre7:":                   "-C/--dhchap-ctrl-secret: key: the secret is not base64",
	} {
		out, errs, code := run(strings.Fields(args)...)
		if code != exit.Usage && code != exit.NotFound || !strings.Contains(errs, wrong) || strings.Contains(out+errs, "5ecre7") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: exit code %d, %s%s", args, code, out, errs)
		}
	}
}

// TestOpenKeyFile: a key that others can read is used, with a warning.
func TestOpenKeyFile(t *testing.T) {
	_, file := newKeyFile(t)
	for mode, warned := range map[fs.FileMode]bool{0o600: false, 0o400: false, 0o640: true, 0o602: true} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		_, errs, code := execProgram(t, "check-dhchap-key", "-k", "@"+file)
		if code != exit.OK || strings.Contains(errs, "key file "+file+": others than its owner") != warned || !warned && errs != "" {
			t.Errorf("%v: exit code %d, %s", mode, code, errs)
		}
	}
}

// TestMemoryFiles checks that what a child inherits are its keys, in order, readable more
// than once.
func TestMemoryFiles(t *testing.T) {
	k, err := auth.GenerateKey(auth.NoHash, 32)
	if err != nil {
		t.Fatal(err)
	}
	args, files, err := keys{k, k}.handOver()
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(files)
	if want := "--dhchap-secret=@/proc/self/fd/4 --dhchap-ctrl-secret=@/proc/self/fd/5"; strings.Join(args, " ") != want {
		t.Errorf("arguments %q", args)
	}
	for range 2 {
		for _, f := range files {
			got, err := options.ParseSecret(options.DescriptorSecret(int(f.Fd())))
			if err != nil || !got.Equal(k) {
				t.Error(errors.Join(err, errors.New("the file has another key")))
			}
		}
	}
}

// newKeyFile returns a key, and a file with it.
func newKeyFile(t *testing.T) (*auth.Key, string) {
	t.Helper()
	k, err := auth.GenerateKey(auth.SHA256, 32)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(k.Text()), 0o600); err != nil {
		t.Fatal(err)
	}
	return k, file
}
