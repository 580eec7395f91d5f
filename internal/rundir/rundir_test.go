package rundir

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
)

// stranger is the number of a user who has nothing here.
const stranger = 61234

// TestMain lets the test be another user's process.
func TestMain(m *testing.M) {
	if path := os.Getenv("RUNDIR_TEST_MAKE"); path != "" {
		err := Make(path, 0o700)
		if err == nil {
			var f *os.File
			if f, err = OpenFile(filepath.Join(path, "log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err == nil {
				_, err = f.WriteString("a line\n")
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// asUser makes path, and a log in it, as the user uid.
func asUser(t *testing.T, uid uint32, path string) error {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{"RUNDIR_TEST_MAKE=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if err != nil && len(out) > 0 {
		return errors.New(strings.TrimSpace(string(out)))
	}
	return err
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.Need(t, "root", errors.New("only root can be another user"))
	}
}

// tmp is a directory like /tmp.
func tmp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rundir")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	return dir
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func wantUnsafe(t *testing.T, err error, words string) {
	t.Helper()
	var u *UnsafeError
	if !errors.As(err, &u) || !strings.Contains(err.Error(), words) {
		t.Errorf("%v, want an UnsafeError with %q", err, words)
	}
}

// The attack: somebody else made the directory of the victim's name first, with
// a log that is a link to a file of the victim.
func TestDirectoryOfAStranger(t *testing.T) {
	needRoot(t)
	dir := tmp(t)
	path := filepath.Join(dir, "ublk-nvmeof-1000")
	target := filepath.Join(dir, "profile")
	must(t, os.Mkdir(path, 0o777), os.Chmod(path, 0o777), os.Chown(path, stranger, stranger),
		os.Symlink(target, filepath.Join(path, "log")))
	for _, uid := range []uint32{0, 1000} {
		err := asUser(t, uid, path)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("it belongs to user %d, not to user %d", stranger, uid)) {
			t.Errorf("user %d: %v", uid, err)
		}
	}
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the log was written through the link: %v", err)
	}
	if err := asUser(t, stranger, path); err == nil || !strings.Contains(err.Error(), "others can write to it (mode 0777)") {
		t.Errorf("the owner of a directory that all can write to: %v", err)
	}
	must(t, os.Chmod(path, 0o755))
	if err := asUser(t, stranger, path); err == nil || !strings.Contains(err.Error(), "it is a symbolic link; want a regular file") {
		t.Errorf("a log that is a link: %v", err)
	}
}

func TestUserMakesADirectory(t *testing.T) {
	needRoot(t)
	path := filepath.Join(tmp(t), "a", "b")
	must(t, asUser(t, stranger, path), asUser(t, stranger, path))
	text, err := os.ReadFile(filepath.Join(path, "log"))
	if err != nil || string(text) != "a line\na line\n" {
		t.Errorf("%q, %v", text, err)
	}
	for path, want := range map[string]fs.FileMode{path: 0o700, filepath.Dir(path): 0o755, filepath.Join(path, "log"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	// Root does not use it for itself, but may look.
	wantUnsafe(t, Make(path, 0o755), "it belongs to user 61234, not to user 0")
}

// A directory whose name leads through something that somebody else can change.
func TestWayOfAStranger(t *testing.T) {
	needRoot(t)
	dir := tmp(t)
	theirs, open, group := filepath.Join(dir, "theirs"), filepath.Join(dir, "open"), filepath.Join(dir, "group")
	must(t, os.Mkdir(theirs, 0o755), os.Chown(theirs, stranger, stranger),
		os.Mkdir(open, 0o755), os.Chmod(open, 0o777),
		os.Mkdir(group, 0o755), os.Chmod(group, 0o775), os.Chown(group, 0, stranger))
	wantUnsafe(t, Make(filepath.Join(theirs, "run"), 0o755), theirs+": it belongs to user 61234")
	wantUnsafe(t, Make(filepath.Join(open, "run"), 0o755), open+": everybody can write to it")
	wantUnsafe(t, Make(filepath.Join(group, "run"), 0o755), group+": group 61234 can write to it")
	wantUnsafe(t, Make(group, 0o755), "others can write to it (mode 0775)")
	must(t, os.Chown(group, 0, 0), Make(filepath.Join(group, "run"), 0o755))
}

func TestLinks(t *testing.T) {
	dir := tmp(t)
	dest, link := filepath.Join(dir, "dest"), filepath.Join(dir, "link")
	must(t, os.Mkdir(dest, 0o755), os.Symlink("dest", link), os.Symlink("loop", filepath.Join(dir, "loop")),
		os.Symlink(dest+"/../dest", filepath.Join(dir, "absolute")))
	// On the way a link of ours is followed, as /var/run is.
	must(t, Make(filepath.Join(link, "run"), 0o755), Make(filepath.Join(dir, "absolute", "run"), 0o755), Check(filepath.Join(dest, "run")))
	if entries, err := os.ReadDir(dest); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	wantUnsafe(t, Make(link, 0o755), "it is a symbolic link; want a directory")
	wantUnsafe(t, Check(link), "it is a symbolic link; want a directory")
	if err := Make(filepath.Join(dir, "loop", "run"), 0o755); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link to itself: %v", err)
	}
	if os.Geteuid() == 0 {
		must(t, os.Lchown(link, stranger, stranger))
		wantUnsafe(t, Make(filepath.Join(link, "run"), 0o755), "it is a symbolic link of user 61234")
	}
}

func TestCheck(t *testing.T) {
	dir := tmp(t)
	must(t, Check(filepath.Join(dir, "none")), Check(filepath.Join(dir, "none", "none")), Check("/"))
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	if err := Check(filepath.Join(dir, "file")); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
	for _, err := range []error{Check("relative"), Make("relative", 0o755), Check("")} {
		if err == nil || !strings.Contains(err.Error(), "want an absolute path") {
			t.Error(err)
		}
	}
}

func TestOpenFile(t *testing.T) {
	dir := filepath.Join(tmp(t), "run")
	must(t, Make(dir, 0o700), unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	_, err := OpenFile(filepath.Join(dir, "fifo"), os.O_RDONLY, 0)
	wantUnsafe(t, err, "it is no regular file")
	if _, err := OpenFile(filepath.Join(dir, "none"), os.O_RDONLY, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	f, err := OpenFile(filepath.Join(dir, "file"), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	defer f.Close()
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: a child would inherit it", flags, err)
	}
}

// Everybody who keeps something at the same time gets what the first one kept.
func TestKeep(t *testing.T) {
	dir := filepath.Join(tmp(t), "state")
	must(t, Make(dir, 0o700))
	path := filepath.Join(dir, "id")
	got := make([]string, 20)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			text, err := Keep(path, fmt.Appendf(nil, "%d", i), 0o644)
			if err != nil {
				t.Error(err)
			}
			got[i] = string(text)
		})
	}
	wg.Wait()
	for _, g := range got {
		if g == "" || g != got[0] {
			t.Fatalf("%q", got)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	must(t, os.Remove(path), os.Symlink("/etc/hostname", path))
	_, err := Keep(path, []byte("x"), 0o644)
	wantUnsafe(t, err, "it is a symbolic link")
}

func TestListen(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(tmp(t), "run")
	must(t, Make(dir, 0o755))
	path := filepath.Join(dir, "socket")
	l, err := Listen(path)
	must(t, err)
	defer l.Close()
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	c, err := net.Dial("unix", path)
	must(t, err, c.Close())
	long := filepath.Join(dir, strings.Repeat("x", 107))
	if _, err := Listen(long); err == nil || !strings.Contains(err.Error(), "the path of a socket has at most 107") {
		t.Error(err)
	}
}

// TestShared: processes of a user find the same directories whatever their environment is,
// and root has only its own.
func TestShared(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/elsewhere")
	uid := strconv.Itoa(os.Geteuid())
	if uid == "0" {
		if got := Shared(); !slices.Equal(got, []string{System}) {
			t.Errorf("%q", got)
		}
		return
	}
	want := []string{"/elsewhere/ublk-nvmeof", System, "/run/user/" + uid + "/ublk-nvmeof", "/tmp/ublk-nvmeof-" + uid}
	if got := Shared(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/"+uid)
	if got := Shared(); len(got) != 3 || got[0] != want[2] {
		t.Errorf("%q", got)
	}
}

func TestDefault(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1000")
	t.Setenv("XDG_STATE_HOME", "/home/u/state")
	t.Setenv("STATE_DIRECTORY", "/var/lib/service:/var/lib/other")
	if dir, err := Persistent(); dir != "/var/lib/service" || err != nil {
		t.Errorf("%s %v", dir, err)
	}
	t.Setenv("STATE_DIRECTORY", "")
	if os.Geteuid() == 0 {
		dir, err := Persistent()
		if Default() != "/run/ublk-nvmeof" || dir != "/var/lib/ublk-nvmeof" || err != nil {
			t.Errorf("%s %s %v", Default(), dir, err)
		}
		return
	}
	dir, err := Persistent()
	if Default() != "/run/user/1000/ublk-nvmeof" || dir != "/home/u/state/ublk-nvmeof" || err != nil {
		t.Errorf("%s %s %v", Default(), dir, err)
	}
	for _, unset := range []string{"", "relative"} {
		t.Setenv("XDG_RUNTIME_DIR", unset)
		t.Setenv("XDG_STATE_HOME", unset)
		t.Setenv("HOME", "/home/u")
		dir, err := Persistent()
		if want := fmt.Sprintf("%s/ublk-nvmeof-%d", os.TempDir(), os.Geteuid()); Default() != want || dir != "/home/u/.local/state/ublk-nvmeof" || err != nil {
			t.Errorf("%s %s %v", Default(), dir, err)
		}
	}
}
