package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	sent := []frame{
		{frameReady, nil},
		{frameStdout, []byte("a\x00b\n")},
		{frameStderr, bytes.Repeat([]byte{7}, maxFrame)},
		{frameExit, []byte("137")},
	}
	for _, f := range sent {
		if err := writeFrame(&b, f.kind, f.payload); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(b.Bytes())
	for i, want := range sent {
		kind, payload, err := readFrame(&b)
		if err != nil || kind != want.kind || !bytes.Equal(payload, want.payload) {
			t.Fatalf("frame %d: kind %d, %d bytes, %v; want kind %d, %d bytes", i, kind, len(payload), err, want.kind, len(want.payload))
		}
	}
	if _, _, err := readFrame(&b); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
	if _, _, err := readFrame(bytes.NewReader(whole[5:12])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("torn frame: %v, want unexpected EOF", err)
	}
	if _, _, err := readFrame(bytes.NewReader([]byte{byte(frameStdout), 0xff, 0xff, 0xff, 0xff})); err == nil {
		t.Error("a frame of 4 GiB was taken")
	}
}

// The archive is read back by cpio(1) where there is one, and by its layout in
// any case.
func TestCPIO(t *testing.T) {
	var b bytes.Buffer
	c := newCPIO(&b)
	c.dir("dev")
	c.char("dev/console", 5, 1)
	c.file("init", []byte("hello"))
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	rest := b.Bytes()
	for _, want := range []struct {
		name, mode, rdev, data string
	}{
		{"dev", "000041ed", "0000000000000000", ""},
		{"dev/console", "00002180", "0000000500000001", ""},
		{"init", "000081ed", "0000000000000000", "hello"},
		{"TRAILER!!!", "00000000", "0000000000000000", ""},
	} {
		if len(rest) < 110 || string(rest[:6]) != "070701" {
			t.Fatalf("no header before %s", want.name)
		}
		field := func(i int) string { return string(rest[6+8*i : 6+8*(i+1)]) }
		head := 110 + len(want.name) + 1
		head += -head & 3
		name := string(bytes.TrimRight(rest[110:head], "\x00"))
		data := string(rest[head : head+len(want.data)])
		if name != want.name || field(1) != want.mode || field(9)+field(10) != want.rdev || data != want.data {
			t.Fatalf("entry %q mode %s device %s data %q; want %+v", name, field(1), field(9)+field(10), data, want)
		}
		rest = rest[head+len(data)+-len(data)&3:]
	}
	if len(rest) != 0 {
		t.Errorf("%d bytes after the trailer", len(rest))
	}
}

func TestLoadOrder(t *testing.T) {
	const dep = `kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/net/9p/9pnet.ko.xz:
kernel/fs/netfs/netfs.ko.xz:
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
`
	got, err := loadOrder(dep, "kernel/drivers/virtio/virtio-pci.ko\n", []string{"virtio_pci", "9p", "9pnet", "net_failover"})
	want := []string{
		"kernel/fs/netfs/netfs.ko.xz", "kernel/net/9p/9pnet.ko.xz", "kernel/fs/9p/9p.ko.xz",
		"kernel/net/core/failover.ko", "kernel/drivers/net/net_failover.ko",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if _, err := loadOrder(dep, "", []string{"virtio_pci"}); err == nil {
		t.Error("a module that is nowhere was taken")
	}
}

func TestSourcesList(t *testing.T) {
	const mirrors = `Debian Debian http://mirror.invalid/debian/
Debian Debian http://other.invalid/debian/
Debian Debian-Security http://mirror.invalid/security/
Somebody Debian http://third.invalid/
`
	got, err := sourcesList(mirrors, []suite{{"Debian", "stable"}, {"Debian-Security", "stable-security"}})
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if len(lines) != 2 ||
		!strings.HasSuffix(lines[0], " http://mirror.invalid/debian/ stable main") ||
		!strings.HasSuffix(lines[1], " http://mirror.invalid/security/ stable-security main") {
		t.Errorf("got\n%s", got)
	}
	if _, err := sourcesList("Somebody Debian http://third.invalid/\n", []suite{{"Debian", "stable"}}); err == nil {
		t.Error("a stranger's archive was taken for Debian's")
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"--kernel", "7.3", "--icount", "--timeout=90s", "--", "sh", "-c", "exit 3"})
	if err != nil || o.kernel != "7.3" || !o.icount || o.timeout != 90*time.Second || !slices.Equal(o.command, []string{"sh", "-c", "exit 3"}) {
		t.Errorf("got %+v, %v", o, err)
	}
	// As go test -exec calls it: the flags of the test follow the program.
	if o, err := parseOptions([]string{"x.test", "-test.v"}); err != nil || !slices.Equal(o.command, []string{"x.test", "-test.v"}) {
		t.Errorf("got %+v, %v", o, err)
	}
	for _, args := range [][]string{
		{}, {"--cpus", "0", "true"}, {"--mtu", "100", "true"}, {"--timeout", "-1s", "true"},
		{"--accel", "hvf", "true"}, {"--icount", "--accel", "kvm", "true"},
	} {
		if _, err := parseOptions(args); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
	if code, err := hostMain([]string{"--cpus", "0", "true"}); code != exitUsage || err == nil {
		t.Errorf("exit code %d, %v; want %d", code, err, exitUsage)
	}
	t.Setenv("UN_CACHE", t.TempDir())
	if code, err := hostMain([]string{"--kernel", "2.4", "true"}); code != exitVM || err == nil || !strings.Contains(err.Error(), "6.12") {
		t.Errorf("exit code %d, %v; want %d and the known kernels", code, err, exitVM)
	}
}

func TestGuestEnv(t *testing.T) {
	t.Setenv("UN_REQUIRE", "root")
	t.Setenv("UN_VM", "wrong")
	t.Setenv("SECRET", "x")
	t.Setenv("WANTED", "y")
	env := guestEnv(options{kernel: "7.3", out: "/tmp/o", env: []string{"WANTED", "A=b"}})
	for _, want := range []string{"UN_VM=1", "UN_KERNEL=7.3", "UN_OUT=/tmp/o", "UN_REQUIRE=root", "WANTED=y", "A=b"} {
		if !slices.Contains(env, want) {
			t.Errorf("no %s in %q", want, env)
		}
	}
	for _, nv := range env {
		if strings.HasPrefix(nv, "SECRET=") || nv == "UN_VM=wrong" {
			t.Errorf("%s was passed", nv)
		}
	}
}

// fakeQEMU makes a shell script the QEMU of the test.
func fakeQEMU(t *testing.T, script string) machine {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "qemu-system-x86_64"), []byte("#!/bin/bash\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("STATE", filepath.Join(dir, "state"))
	if _, err := exec.LookPath("bash"); err != nil {
		t.Fatal(err)
	}
	return machine{accel: "tcg", cpus: 1, memory: "1G", timeout: time.Minute, stdout: new(bytes.Buffer), stderr: new(bytes.Buffer)}
}

// Frames in bash: kind, length in little endian, payload.
const (
	sayHello = `echo "vm: init" >&3; `
	sayReady = `printf '\x01\0\0\0\0' >&4; `
	sayOut   = `printf '\x02\x03\0\0\0out' >&4; printf '\x03\x03\0\0\0err' >&4; `
	sayExit7 = `printf '\x04\x01\0\0\0007' >&4; `
)

func TestRunReturnsExitCode(t *testing.T) {
	// The command's end does not wait for the machine's.
	m := fakeQEMU(t, sayHello+sayReady+sayOut+sayExit7+"exec sleep 1000")
	code, err := m.run()
	out, errs := m.stdout.(*bytes.Buffer).String(), m.stderr.(*bytes.Buffer).String()
	if code != 7 || err != nil || out != "out" || errs != "err" {
		t.Errorf("exit code %d, %v, output %q and %q; want 7, out, err", code, err, out, errs)
	}
}

func TestRunBootsAgain(t *testing.T) {
	m := fakeQEMU(t, `echo x >>$STATE; if [ $(wc -l <$STATE) -lt 3 ]; then echo "Kernel panic" >&3; exit 0; fi; `+
		sayHello+sayReady+sayExit7+"exec sleep 1000")
	code, err := m.run()
	if code != 7 || err != nil {
		t.Errorf("exit code %d, %v; want 7 from the third boot", code, err)
	}
	if said := m.stderr.(*bytes.Buffer).String(); strings.Count(said, "Kernel panic") != 2 {
		t.Errorf("the panics of two boots are not in %q", said)
	}
}

func TestRunGivesUp(t *testing.T) {
	m := fakeQEMU(t, `echo x >>$STATE; exit 1`)
	code, err := m.run()
	var early *bootError
	if code != exitVM || !errors.As(err, &early) {
		t.Errorf("exit code %d, %v; want %d and a boot error", code, err, exitVM)
	}
	if tries, _ := os.ReadFile(os.Getenv("STATE")); strings.Count(string(tries), "x") != bootAttempts {
		t.Errorf("%d boots, want %d", strings.Count(string(tries), "x"), bootAttempts)
	}
}

// What may have changed something is not run a second time.
func TestRunCrashAfterReady(t *testing.T) {
	m := fakeQEMU(t, `echo x >>$STATE; `+sayHello+sayReady+`echo "Oops: 0002" >&3; exit 0`)
	code, err := m.run()
	if code != exitVM || err == nil || !strings.Contains(err.Error(), "Oops: 0002") || !strings.Contains(err.Error(), "exit status 0") {
		t.Errorf("exit code %d, %v; want %d, how QEMU ended, and the console", code, err, exitVM)
	}
	if tries, _ := os.ReadFile(os.Getenv("STATE")); strings.Count(string(tries), "x") != 1 {
		t.Error("the command was started twice")
	}
}

func TestRunTimeout(t *testing.T) {
	m := fakeQEMU(t, sayHello+sayReady+sayOut+`echo "task sleep blocked" >&3; read -rN5 <&4; exit 0`)
	m.timeout = 10 * time.Millisecond
	code, err := m.run()
	if code != exitTimeout || err == nil || !strings.Contains(err.Error(), "task sleep blocked") {
		t.Errorf("exit code %d, %v; want %d and the console", code, err, exitTimeout)
	}
}
