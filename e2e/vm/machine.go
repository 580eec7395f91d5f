package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bootAttempts = 3                // about one emulated boot in some dozens dies before init
	initLimit    = 60 * time.Second // from QEMU's start to the first word of the guest; usual: 2 to 5 s
	readyLimit   = 60 * time.Second // from there to the command's start; usual: 1 s
	dumpTime     = 5 * time.Second  // for the guest to print its blocked tasks after a timeout
	// shutdownLimit is for systemd to stop all services. Its own limit for one of them is 90 s.
	shutdownLimit = 4 * time.Minute
	tailLines     = 80 // of the console, shown when the VM fails
)

// machine is one virtual machine to be. Its fields are set once.
type machine struct {
	kernel   kernel
	guest    guestConfig
	accel    string // kvm or tcg
	cpus     int
	memory   string
	icount   bool
	parallel bool
	append   string
	cable    string   // path of a socket, or empty
	disks    []string // paths of the sockets of vhost-user-blk back ends
	nbds     []string // paths of the sockets of NBD servers
	reboot   bool     // the guest may reboot
	disk     string   // path of the image of the writable layer, or empty
	timeout  time.Duration
	verbose  bool
	stdout   io.Writer
	stderr   io.Writer
}

// bootError is a VM that ended, or said nothing, before the command started: a
// reason to try again.
type bootError struct{ reason string }

func (e *bootError) Error() string { return "boot: " + e.reason }

// run boots until the command has started, and returns its exit code. With an
// error the code is the runner's own.
func (m *machine) run() (int, error) {
	for attempt := 1; ; attempt++ {
		code, err := m.boot()
		var early *bootError
		if !errors.As(err, &early) || attempt == bootAttempts {
			return code, err
		}
		fmt.Fprintf(m.stderr, "vm: attempt %d of %d: %v\n", attempt, bootAttempts, err)
	}
}

func (m *machine) boot() (int, error) {
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		return exitVM, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	initrd := filepath.Join(dir, "initramfs")
	if err := m.writeInitramfs(initrd, m.kernel.boot); err != nil {
		return exitVM, err
	}
	start := time.Now()
	q, err := startQEMU(m.arguments(initrd), m.console())
	if err != nil {
		return exitVM, err
	}
	defer q.kill()

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)

	limit := time.NewTimer(initLimit)
	ready, signalled := false, false
	for {
		select {
		case <-q.alive:
			q.alive = nil
			limit.Reset(readyLimit)

		case f, ok := <-q.frames:
			if !ok {
				if !ready {
					return exitVM, &bootError{"the VM ended" + q.ended()}
				}
				return exitVM, errors.New("the VM ended before the command" + q.ended())
			}
			switch f.kind {
			case frameReady:
				ready, q.alive = true, nil
				if m.verbose {
					fmt.Fprintf(m.stderr, "vm: kernel %s, %s, up in %.1f s\n", m.kernel.release, m.accel, time.Since(start).Seconds())
				}
				limit.Stop()
				if m.timeout > 0 {
					limit.Reset(m.timeout)
				}
			case frameStdout, frameStderr:
				m.show(f)
			case frameFail:
				return exitVM, fmt.Errorf("guest: %s%s", f.payload, q.said())
			case frameExit:
				code, err := strconv.Atoi(string(f.payload))
				if err != nil {
					return exitVM, fmt.Errorf("exit code: %w", err)
				}
				if m.guest.Systemd {
					if err := q.awaitShutdown(m, shutdownLimit); err != nil {
						return cmp.Or(code, exitVM), err
					}
				}
				return code, nil
			}

		case s := <-signals:
			if !ready || signalled {
				return 128 + int(s.(syscall.Signal)), fmt.Errorf("ended by %v", s)
			}
			signalled = true
			if err := writeFrame(q.control, frameSignal, []byte{byte(s.(syscall.Signal))}); err != nil {
				return exitVM, err
			}

		case <-limit.C:
			if !ready {
				return exitVM, &bootError{"no sign of life in time" + q.said()}
			}
			_ = writeFrame(q.control, frameDump, nil) // as far as it still listens
			q.drain(m, dumpTime)
			return exitTimeout, fmt.Errorf("command still running after --timeout %v%s", m.timeout, q.said())
		}
	}
}

// show passes output on. That nobody reads it is no reason to end the command.
func (m *machine) show(f frame) {
	switch f.kind {
	case frameStdout:
		_, _ = m.stdout.Write(f.payload)
	case frameStderr:
		_, _ = m.stderr.Write(f.payload)
	}
}

// arguments is QEMU's command line; descriptor 3 is the console, 4 the control
// port.
func (m *machine) arguments(initrd string) []string {
	args := append(m.basic(initrd),
		"-chardev", "socket,id=console,fd=3", "-serial", "chardev:console",
		"-chardev", "socket,id=control,fd=4", "-device", "virtio-serial-pci",
		"-device", "virtserialport,chardev=control,name="+portName,
		"-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
		// Takes the guest's packets and leads nowhere. (A hub without another port
		// leads nowhere, too, but lets the queue fill until the driver complains.)
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=")
	if m.guest.Out != "" {
		path := strings.ReplaceAll(m.guest.Out, ",", ",,")
		args = append(args, "-virtfs", "local,path="+path+",mount_tag=out,security_model=none,multidevs=remap")
	}
	if m.cable != "" {
		// Who comes first makes the socket.
		_, err := os.Stat(m.cable)
		server, mac := "on", "52:54:00:00:01:01"
		if err == nil {
			server, mac = "off", "52:54:00:00:01:02"
		}
		args = append(args, "-netdev", "stream,id=cable,server="+server+",addr.type=unix,addr.path="+strings.ReplaceAll(m.cable, ",", ",,"),
			"-device", "virtio-net-pci,netdev=cable,romfile=,mac="+mac)
	}
	if m.disk != "" {
		args = append(args, "-drive", "if=none,id=layer,format=raw,cache=unsafe,file="+strings.ReplaceAll(m.disk, ",", ",,"),
			"-device", "virtio-blk-pci,drive=layer,serial="+layerSerial)
	}
	args = append(args, m.diskArguments(m.disks)...)
	for i, path := range m.nbds {
		args = append(args, "-drive", fmt.Sprintf("if=none,id=nbd%d,format=raw,cache=none,file.driver=nbd,file.export=1,file.server.type=unix,file.server.path=%s", i, strings.ReplaceAll(path, ",", ",,")),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=nbd%d,num-queues=%d", i, m.cpus))
	}
	if !m.reboot {
		args = append(args, "-no-reboot")
	}
	switch {
	case m.accel == "kvm":
		return append(args, "-accel", "kvm")
	case m.icount:
		return append(args, "-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off")
	case m.parallel:
		return append(args, "-accel", "tcg,thread=multi")
	default:
		// In turns, on one thread. A virtual CPU that spins, until another one lets go
		// of a lock or answers, gives its turn away, where on threads it takes the
		// time that the other one needs.
		return append(args, "-accel", "tcg,thread=single")
	}
}

// basic are the arguments that every machine has.
func (m *machine) basic(initrd string) []string {
	// norandmaps: code that is emulated is translated once, and not once for each
	// address where a process has it.
	params := "console=ttyS0 tsc=reliable mitigations=off norandmaps quiet panic=-1 net.ifnames=0 sysrq_always_enabled=1 " + m.append
	cpu := "max"
	if m.accel != "kvm" {
		// QEMU 7.2 makes up the flags after CMPXCHG16B, but for ZF. When an
		// interrupt comes just then, the kernel goes on with them, and single-steps, say.
		cpu += ",cx16=off"
	}
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-cpu", cpu,
		"-smp", strconv.Itoa(m.cpus), "-m", m.memory,
		"-kernel", m.kernel.image, "-initrd", initrd, "-append", strings.TrimSpace(params),
	}
}

// diskArguments are the disks of vhost-user-blk back ends, which share the guest's memory.
// A back end that dies is connected again.
func (m *machine) diskArguments(sockets []string) []string {
	if len(sockets) == 0 {
		return nil
	}
	args := []string{"-object", "memory-backend-memfd,id=memory,size=" + m.memory + ",share=on", "-machine", "memory-backend=memory"}
	for i, path := range sockets {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=disk%d,path=%s,reconnect=1", i, strings.ReplaceAll(path, ",", ",,")),
			"-device", fmt.Sprintf("vhost-user-blk-pci,chardev=disk%d,num-queues=%d", i, m.cpus))
	}
	return args
}

// writeInitramfs packs this program as /init, the boot modules and the guest's
// configuration.
func (m *machine) writeInitramfs(path string, modules []string) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	config, err := json.Marshal(m.guest)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	c := newCPIO(f)
	for _, d := range []string{"dev", "proc", "sys", "modules", "host", "memory", "root"} {
		c.dir(d)
	}
	c.char("dev/console", 5, 1)
	c.char("dev/null", 1, 3)
	c.file("init", self)
	c.file(guestConfigFile, config)
	for _, ko := range modules {
		data, err := os.ReadFile(ko)
		if err != nil {
			return err
		}
		c.file("modules/"+filepath.Base(ko), data)
	}
	if err := c.close(); err != nil {
		return err
	}
	return f.Close()
}

// console opens where the console's text goes, beside the tail kept for errors.
func (m *machine) console() io.Writer {
	var w []io.Writer
	if m.verbose {
		w = append(w, m.stderr)
	}
	if m.guest.Out != "" {
		if f, err := os.Create(filepath.Join(m.guest.Out, "console.log")); err == nil {
			w = append(w, f) // closed by the program's end
		}
	}
	return io.MultiWriter(w...)
}

// qemu is a running QEMU with its two channels.
type qemu struct {
	cmd     *exec.Cmd
	control *os.File        // host's end of the control port
	frames  <-chan frame    // from the guest; closed when QEMU has ended
	lost    error           // why else frames was closed; valid after that
	alive   <-chan struct{} // closed when the guest's init has spoken on the console
	tail    *consoleTail
	stderr  *bytes.Buffer // QEMU's own complaints
	readers *sync.WaitGroup
}

type frame struct {
	kind    frameKind
	payload []byte
}

func startQEMU(args []string, console io.Writer) (*qemu, error) {
	consoleHost, consoleGuest, err := socketPair("console")
	if err != nil {
		return nil, err
	}
	controlHost, controlGuest, err := socketPair("control")
	if err != nil {
		return nil, err
	}
	q := &qemu{
		cmd:     exec.Command("qemu-system-x86_64", args...),
		control: controlHost,
		stderr:  new(bytes.Buffer),
		readers: new(sync.WaitGroup),
	}
	q.cmd.Stderr = q.stderr
	q.cmd.ExtraFiles = []*os.File{consoleGuest, controlGuest}
	// A runner killed outright takes its VM along. The signal is tied to the
	// thread that starts the child, hence the lock.
	runtime.LockOSThread()
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	if err := q.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w (e2e/setup installs what the host needs)", err)
	}
	consoleGuest.Close()
	controlGuest.Close()

	alive := make(chan struct{})
	q.alive, q.tail = alive, &consoleTail{alive: alive}
	frames := make(chan frame)
	q.frames = frames
	q.readers.Go(func() {
		_, _ = io.Copy(io.MultiWriter(q.tail, console), consoleHost)
		consoleHost.Close()
	})
	q.readers.Go(func() {
		defer close(frames)
		for {
			kind, payload, err := readFrame(controlHost)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					q.lost = err
				}
				return
			}
			frames <- frame{kind, payload}
		}
	})
	return q, nil
}

// kill ends QEMU and waits for the readers. Nothing of the guest needs a
// shutdown: what it may write, --out, is written through.
func (q *qemu) kill() {
	_ = q.cmd.Process.Kill() // or it has ended already
	go func() {
		for range q.frames { // lets the reader go
		}
	}()
	_ = q.cmd.Wait()
	q.readers.Wait()
	q.control.Close()
}

// awaitShutdown waits until the guest has reset itself: the machine ends at a reset. If it
// has not, the console shows its blocked tasks.
func (q *qemu) awaitShutdown(m *machine, limit time.Duration) error {
	alarm := time.NewTimer(limit)
	defer alarm.Stop()
	for {
		select {
		case _, ok := <-q.frames:
			if !ok {
				return nil
			}
		case <-alarm.C:
			_ = writeFrame(q.control, frameDump, nil) // the agent may have ended
			q.drain(m, dumpTime)
			return fmt.Errorf("the machine did not shut down within %v%s", limit, q.said())
		}
	}
}

// ended is how QEMU, which has closed the control port, ended, and what was said
// before: "exit status 0" is a guest that reset itself, a signal is somebody's.
func (q *qemu) ended() string {
	// It is on its way out. If not, the port's end had another reason, and said
	// ends it.
	alarm := time.AfterFunc(2*time.Second, func() { _ = q.cmd.Process.Kill() })
	_ = q.cmd.Wait()
	alarm.Stop()
	how := fmt.Sprintf(" (QEMU: %v)", q.cmd.ProcessState)
	if q.lost != nil {
		how += fmt.Sprintf(" (%v)", q.lost)
	}
	return how + q.said()
}

// drain passes output on for a while.
func (q *qemu) drain(m *machine, d time.Duration) {
	end := time.After(d)
	for {
		select {
		case f, ok := <-q.frames:
			if !ok {
				return
			}
			m.show(f)
		case <-end:
			return
		}
	}
}

// said is the end of the console and QEMU's own errors, to append to an error.
func (q *qemu) said() string {
	q.kill()
	var b strings.Builder
	if text := bytes.TrimSpace(q.stderr.Bytes()); len(text) > 0 {
		fmt.Fprintf(&b, "\n--- QEMU\n%s", text)
	}
	fmt.Fprintf(&b, "\n--- end of the console\n%s\n---", q.tail.last(tailLines))
	return b.String()
}

// consoleTail keeps the console's end and notices the guest's first word.
type consoleTail struct {
	mu    sync.Mutex // guards the rest
	text  []byte
	alive chan<- struct{} // nil after its close
}

func (t *consoleTail) Write(p []byte) (int, error) {
	const keep = 128 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if t.alive != nil && bytes.Contains(t.text, []byte(guestHello)) {
		close(t.alive)
		t.alive = nil
	}
	if len(t.text) > 2*keep {
		t.text = append([]byte(nil), t.text[len(t.text)-keep:]...)
	}
	return len(p), nil
}

func (t *consoleTail) last(lines int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(t.text), "\r", "")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func socketPair(name string) (host, guest *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair %s: %w", name, err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// kvmWorks tells whether a kernel boots under KVM here: /dev/kvm may exist and
// still not run a stock kernel. The answer is kept until the host reboots.
func kvmWorks(cache string, k kernel) bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false
	}
	memo := filepath.Join(cache, "kvm-"+strings.TrimSpace(string(boot)))
	if answer, err := os.ReadFile(memo); err == nil {
		return string(answer) == "yes"
	}
	m := machine{
		kernel: k, accel: "kvm", cpus: 2, memory: "1G", timeout: 20 * time.Second,
		guest:  guestConfig{Command: []string{"true"}, Dir: "/", MTU: 1500, Release: k.release, Modules: k.modules},
		stdout: io.Discard, stderr: io.Discard,
	}
	answer := "no"
	if code, err := m.boot(); err == nil && code == 0 {
		answer = "yes"
	}
	_ = os.WriteFile(memo, []byte(answer), 0o644) // else the next run finds out again
	return answer == "yes"
}
