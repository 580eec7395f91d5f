package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestConfig is what the host tells the guest, in a file of the initramfs.
type guestConfig struct {
	Command []string
	Dir     string
	Env     []string
	MTU     int
	Release string // uname -r
	Modules string // the host's path of the lib/modules/RELEASE tree
	Out     string // "" = nothing writable
	Before  string // with Systemd: a command to run before systemd
	Systemd bool   // make systemd the first process
	Disk    bool   // the writable layer is on a disk
	Writer  bool   // only write to the disk of a vhost-user-blk back end
}

const (
	guestConfigFile = "config.json"
	guestHello      = "vm: init"
)

// passedEnv are the variables that reach the command, beside UN_* and --env.
var passedEnv = []string{
	"PATH", "HOME", "USER", "LANG", "LC_ALL", "TERM", "TZ", "TMPDIR", "CI",
	"GODEBUG", "GORACE", "GOTRACEBACK", "GOCOVERDIR",
}

// guestEnv is the environment of the command.
func guestEnv(o options) []string {
	env := []string{"UN_VM=1", "UN_KERNEL=" + o.kernel}
	if o.out != "" {
		if out, err := filepath.Abs(o.out); err == nil {
			env = append(env, "UN_OUT="+out)
		}
	}
	for _, name := range passedEnv {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	for _, nv := range os.Environ() {
		switch name, _, _ := strings.Cut(nv, "="); {
		case name == "UN_VM" || name == "UN_KERNEL" || name == "UN_OUT":
		case strings.HasPrefix(name, "UN_"):
			env = append(env, nv)
		}
	}
	for _, nv := range o.env {
		if !strings.Contains(nv, "=") {
			nv += "=" + os.Getenv(nv)
		}
		env = append(env, nv)
	}
	return env
}

// guestMain is the first process of the guest. It must not return.
func guestMain() {
	fmt.Println(guestHello)
	c, err := readGuestConfig()
	if err == nil && c.Writer {
		writerMain() // does not return
	}
	var port *os.File
	if err == nil {
		port, err = guestSetup1()
	}
	if err == nil {
		err = guestRun(port, c)
	}
	if err != nil {
		fmt.Println("vm:", err)
		if port != nil {
			_ = writeFrame(port, frameFail, []byte(err.Error()))
		} else {
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
	}
	for {
		_ = unix.Pause() // the host ends the machine
	}
}

func readGuestConfig() (c guestConfig, err error) {
	text, err := os.ReadFile("/" + guestConfigFile)
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return c, fmt.Errorf("read %s: %w", guestConfigFile, err)
	}
	return c, nil
}

// loadModules mounts the kernel's file systems and loads the modules of the initramfs.
func loadModules() error {
	err := errors.Join(
		mount("devtmpfs", "dev", "/dev", ""),
		mount("proc", "proc", "/proc", ""),
		mount("sysfs", "sys", "/sys", ""))
	if err != nil {
		return err
	}
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
		f.Close()
	}
	return nil
}

// guestSetup1 does what needs the initramfs: modules, control port.
func guestSetup1() (*os.File, error) {
	if err := loadModules(); err != nil {
		return nil, err
	}
	// The port's device appears some time after its driver was loaded.
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if text, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(text)) == portName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
	}
	return nil, fmt.Errorf("no virtio port named %s", portName)
}

// guestRun turns to the host's file system, runs the command and reports.
func guestRun(port *os.File, c guestConfig) error {
	for _, nv := range c.Env {
		if path, ok := strings.CutPrefix(nv, "PATH="); ok {
			if err := os.Setenv("PATH", path); err != nil {
				return err
			}
		}
	}
	if err := guestRoot(c); err != nil {
		return err
	}
	if err := guestNetwork(c); err != nil {
		return err
	}
	if c.Systemd {
		return becomeSystemd(port, c)
	}
	return guestCommand(port, c)
}

// guestRoot makes the host's file system the root, with an overlay in memory or on a disk.
func guestRoot(c guestConfig) error {
	if err := mount("9p", "host", "/host", "trans=virtio,version=9p2000.L,msize=512000,cache=loose", unix.MS_RDONLY); err != nil {
		return err
	}
	layer := func() error { return mount("tmpfs", "memory", "/memory", "mode=755") }
	if c.Disk {
		layer = func() error { return mountLayer(c) }
	}
	if err := layer(); err != nil {
		return err
	}
	for _, d := range []string{"/memory/upper", "/memory/work"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := mount("overlay", "overlay", "/root", "lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work"); err != nil {
		return err
	}
	for _, d := range []string{"dev", "proc", "sys"} {
		if err := unix.Mount("/"+d, "/root/"+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move /%s: %w", d, err)
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := errors.Join(unix.Chroot("."), os.Chdir("/")); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}

	for _, m := range []struct{ fs, at, data string }{
		{"devpts", "/dev/pts", "ptmxmode=666"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=755"},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"configfs", "/sys/kernel/config", ""},
		{"debugfs", "/sys/kernel/debug", ""},
		{"tracefs", "/sys/kernel/tracing", ""},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := mount(m.fs, m.fs, m.at, m.data); err != nil {
			return err
		}
	}
	modules := "/lib/modules/" + c.Release
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(c.Modules, modules, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", modules, err)
	}
	if c.Out != "" {
		if err := os.MkdirAll(c.Out, 0o755); err != nil {
			return err
		}
		// Without a cache every write is on the host when it returns.
		return mount("9p", "out", c.Out, "trans=virtio,version=9p2000.L,msize=512000,cache=none")
	}
	return unix.Sethostname([]byte("vm"))
}

func guestNetwork(c guestConfig) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Env = c.Env
	cmd.Stdin = strings.NewReader(fmt.Sprintf(
		"link set lo up\nlink set eth0 mtu %d up\naddr add 10.0.2.15/24 dev eth0\n", c.MTU))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("set up eth0: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// guestCommand runs the command and passes its output and exit code to the
// host. As the first process it also reaps every orphan.
func guestCommand(port *os.File, c guestConfig) error {
	path, err := lookPath(c)
	if err != nil {
		return err
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	var out, errs, done [2]int // pipes: read end, write end
	for _, p := range []*[2]int{&out, &errs, &done} {
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return err
		}
		if err := unix.SetNonblock(p[0], true); err != nil {
			return err
		}
	}
	if err := writeFrame(port, frameReady, nil); err != nil {
		return err
	}
	child, err := os.StartProcess(path, c.Command, &os.ProcAttr{
		Dir: c.Dir,
		Env: append(c.Env, "PWD="+c.Dir),
		Files: []*os.File{
			null, os.NewFile(uintptr(out[1]), "stdout"), os.NewFile(uintptr(errs[1]), "stderr"),
		},
		Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return err
	}
	unix.Close(out[1])
	unix.Close(errs[1])
	go reap(child.Pid, done[1])
	go obey(port, child.Pid)

	// One thread reads all three pipes, so that the exit code goes out after
	// everything the command wrote before it ended. A process that it left
	// behind may keep the pipes open: their end is not waited for.
	fds := []unix.PollFd{
		{Fd: int32(out[0]), Events: unix.POLLIN},
		{Fd: int32(errs[0]), Events: unix.POLLIN},
		{Fd: int32(done[0]), Events: unix.POLLIN},
	}
	kinds := []frameKind{frameStdout, frameStderr}
	buf := make([]byte, maxFrame)
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		exited := fds[2].Revents != 0
		for i, kind := range kinds {
			for fds[i].Fd >= 0 {
				n, err := unix.Read(int(fds[i].Fd), buf)
				if n > 0 {
					if err := writeFrame(port, kind, buf[:n]); err != nil {
						return err
					}
					continue
				}
				if n == 0 && err == nil {
					fds[i].Fd = -1 // all writers gone
				}
				if err != unix.EINTR {
					break
				}
			}
		}
		if exited {
			n, err := unix.Read(done[0], buf)
			if err != nil {
				return fmt.Errorf("read exit code: %w", err)
			}
			return writeFrame(port, frameExit, buf[:n])
		}
	}
}

// lookPath finds the command as a shell would, with the command's own PATH and
// directory.
func lookPath(c guestConfig) (string, error) {
	if err := os.Chdir(c.Dir); err != nil {
		return "", err
	}
	path, err := exec.LookPath(c.Command[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", err
	}
	return filepath.Abs(path)
}

// reap waits for every child and writes the exit code of the one that counts.
func reap(pid, done int) {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil: // no child left
			return
		case got == pid:
			code := status.ExitStatus()
			if status.Signaled() {
				code = 128 + int(status.Signal())
			}
			if _, err := unix.Write(done, strconv.AppendInt(nil, int64(code), 10)); err != nil {
				fmt.Println("vm: pass exit code on:", err)
			}
		}
	}
}

// obey does what the host asks while the command runs.
func obey(port io.Reader, pid int) {
	for {
		kind, payload, err := readFrame(port)
		if err != nil {
			return
		}
		switch kind {
		case frameSignal:
			unix.Kill(-pid, syscall.Signal(payload[0]))
		case frameDump:
			err := errors.Join(
				os.WriteFile("/proc/sys/kernel/printk", []byte("7"), 0),
				os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0))
			if err != nil {
				fmt.Println("vm: show blocked tasks:", err)
			}
		}
	}
}

// mount mounts a file system of a type; data as in mount(8)'s -o.
func mount(fs, source, target, data string, flags ...uintptr) error {
	var f uintptr
	for _, x := range flags {
		f |= x
	}
	if err := unix.Mount(source, target, fs, f, data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", fs, target, err)
	}
	return nil
}
