// Vm boots a stock Debian kernel under QEMU and runs one command in it as
// root, as if the command had been run here: same files, same directory, output
// streamed, exit code returned. See usage for the details.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const usage = `usage: vm [flags] [--] command [argument ...]

Boots a Debian kernel under QEMU, runs the command in it as root and exits with
its exit code. Works as a runner of tests, too:

	vm --kernel 6.12 -- sh -c 'modprobe ublk_drv && ls /dev/ublk-control'
	go test -exec 'vm --kernel 7.3 --out /tmp/results' ./ublk

Inside the VM:
  - the host's whole file system, read-only, under a writable overlay in memory
    that is forgotten when the VM ends, or on --disk; --out DIR stays writable for
    real. Do not rebuild what the VM is running.
  - the current directory, and the variables PATH, HOME, LANG, TERM, TZ, CI,
    GO* that steer a test binary, UN_*, and every --env NAME
  - UN_VM=1, UN_KERNEL=<the --kernel value>, UN_OUT=<the --out directory>
  - every module of the kernel, for modprobe; configfs, debugfs, cgroup2 mounted
  - eth0 with the address 10.0.2.15/24 and no other host on its network
  - nothing on standard input
  - with --systemd SCRIPT: systemd as the first process, as on an ordinary
    machine, but without the host's enabled units. (With --disk, they are taken
    away when the disk is new.) SCRIPT runs before systemd
    does, and the command beside it. When the command has ended, the machine is
    shut down, which must succeed too.

Exit code: the command's own (128+n when signal n ended it), 124 when --timeout
ended it, 125 when the VM failed; the console's last lines then say more.

Kernels are fetched as Debian packages on first use and kept in $UN_CACHE, by
default build/cache in the repository. Packages needed on the host: e2e/setup.

flags:
`

// Exit codes of the runner itself; the command's own pass through.
const (
	exitUsage   = 2
	exitTimeout = 124
	exitVM      = 125
)

func main() {
	switch {
	case os.Args[0] == agentName:
		agentMain() // does not return
	case os.Getpid() == 1:
		guestMain() // does not return
	}
	code, err := hostMain(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(code)
}

// options are the flags after parsing.
type options struct {
	kernel   string
	cpus     int
	memory   string
	timeout  time.Duration
	icount   bool
	parallel bool
	accel    string
	mtu      int
	out      string
	appendK  string
	cable    string
	disks    []string
	nbds     []string
	reboot   bool
	disk     string
	to       string
	env      []string
	verbose  bool
	fetch    bool
	systemd  string
	command  []string
}

func parseOptions(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.kernel, "kernel", "6.12", "kernel `series` to boot: "+seriesNames())
	fs.IntVar(&o.cpus, "cpus", 4, "number of virtual CPUs")
	fs.StringVar(&o.memory, "mem", "4G", "memory `size`, as QEMU writes it")
	fs.DurationVar(&o.timeout, "timeout", 10*time.Minute, "longest time for the command, boot excluded; 0 = no limit")
	fs.BoolVar(&o.icount, "icount", false, "deterministic mode: emulate on one thread, virtual time follows executed instructions")
	fs.BoolVar(&o.parallel, "parallel", false, "emulate each virtual CPU on a thread of its own: they run at the same time, but slower if there are not as many real ones for them alone")
	fs.StringVar(&o.accel, "accel", "auto", "`kvm`, tcg, or auto: kvm if a trial boot shows that it works")
	fs.IntVar(&o.mtu, "mtu", 1500, "MTU of eth0 in bytes; 4200 lets rdma_rxe use an MTU of 4096")
	fs.StringVar(&o.out, "out", "", "`directory` that the VM may write, at the same path inside; gets console.log")
	fs.StringVar(&o.appendK, "append", "", "more kernel `parameters`")
	fs.StringVar(&o.cable, "cable", "", "`path` of a socket, which is made if it does not exist: a cable between eth1 here and in another VM with the same path")
	fs.Func("vhost-user-blk", "path of the `socket` of a vhost-user-blk back end, for a disk with a queue per virtual CPU (modprobe virtio_blk); repeatable", func(s string) error {
		o.disks = append(o.disks, s)
		return nil
	})
	fs.Func("nbd", "path of the `socket` of an NBD server with an export named 1, for a disk after those of --vhost-user-blk; repeatable", func(s string) error {
		o.nbds = append(o.nbds, s)
		return nil
	})
	fs.StringVar(&o.to, "migrate-to", "", "in place of a command, write to the disk of --vhost-user-blk, migrate the VM to a QEMU whose disk has this `socket`, and go on there; what is read, before and after, must be what was written")
	fs.BoolVar(&o.reboot, "reboot", false, "let the VM reboot (reboot -f), which runs the command again; a panic does so, too")
	fs.StringVar(&o.disk, "disk", "", "`path` of a disk image, which is made if it does not exist: what is written in the VM is there in the next VM with the same disk")
	fs.Func("env", "pass this environment variable, too; `NAME` or NAME=VALUE, repeatable", func(s string) error {
		o.env = append(o.env, s)
		return nil
	})
	fs.StringVar(&o.systemd, "systemd", "", "make systemd the first process, after this `script` has run")
	fs.BoolVar(&o.verbose, "v", false, "show the console and the boot time on standard error")
	fs.BoolVar(&o.fetch, "fetch", false, "only make sure that the kernel is in the cache")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	o.command = fs.Args()
	switch {
	case o.cpus < 1 || o.cpus > 64:
		return o, fmt.Errorf("--cpus %d: want 1 to 64", o.cpus)
	case o.mtu < 1280 || o.mtu > 65535:
		return o, fmt.Errorf("--mtu %d: want 1280 to 65535", o.mtu)
	case o.timeout < 0:
		return o, fmt.Errorf("--timeout %v: want 0 or more", o.timeout)
	case o.accel != "auto" && o.accel != "kvm" && o.accel != "tcg":
		return o, fmt.Errorf("--accel %q: want auto, kvm or tcg", o.accel)
	case o.icount && o.accel == "kvm":
		return o, errors.New("--icount needs emulation, so not --accel kvm")
	case o.icount && o.parallel:
		return o, errors.New("--icount is emulation on one thread, so not --parallel")
	case o.to != "" && (len(o.command) > 0 || len(o.disks) != 1 || o.icount || o.accel == "kvm"):
		return o, errors.New("--migrate-to goes with one --vhost-user-blk and with emulation, and without a command")
	case len(o.command) == 0 && !o.fetch && o.to == "":
		return o, errors.New("no command to run; see --help")
	}
	return o, nil
}

// hostMain is the program on the host.
func hostMain(args []string) (int, error) {
	o, err := parseOptions(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0, nil
	case err != nil:
		return exitUsage, err
	}
	cache, err := cacheDir()
	if err != nil {
		return exitVM, err
	}
	k, err := openKernel(cache, o.kernel)
	if err != nil {
		return exitVM, err
	}
	if o.fetch {
		fmt.Println(k.release)
		return 0, nil
	}
	g := guestConfig{
		Command: o.command,
		Env:     guestEnv(o),
		MTU:     o.mtu,
		Release: k.release,
		Modules: k.modules,
	}
	if g.Dir, err = os.Getwd(); err != nil {
		return exitVM, err
	}
	if o.systemd != "" {
		g.Systemd = true
		if g.Before, err = filepath.Abs(o.systemd); err != nil {
			return exitVM, err
		}
	}
	if o.out != "" {
		if g.Out, err = filepath.Abs(o.out); err != nil {
			return exitVM, err
		}
		if err := os.MkdirAll(g.Out, 0o755); err != nil {
			return exitVM, err
		}
	}
	if o.disk != "" {
		g.Disk = true
		if err := makeDisk(o.disk); err != nil {
			return exitVM, err
		}
	}
	slot, err := takeSlot(cache)
	if err != nil {
		return exitVM, err
	}
	defer slot.Close()
	accel := o.accel
	if accel == "auto" {
		accel = "tcg"
		if !o.icount && o.to == "" && kvmWorks(cache, k) {
			accel = "kvm"
		}
	}
	m := machine{
		kernel: k, guest: g, accel: accel, cpus: o.cpus, memory: o.memory,
		icount: o.icount, parallel: o.parallel, append: o.appendK, cable: o.cable, disks: o.disks, nbds: o.nbds, reboot: o.reboot, disk: o.disk, timeout: o.timeout, verbose: o.verbose,
		stdout: os.Stdout, stderr: os.Stderr,
	}
	if o.to != "" {
		return m.migrate(o.to)
	}
	return m.run()
}

// cacheDir is $UN_CACHE, or build/cache of the repository around the current
// directory.
func cacheDir() (string, error) {
	if dir := os.Getenv("UN_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "e2e", "vm", "main.go")); err == nil {
			return filepath.Join(dir, "build", "cache"), nil
		}
	}
	return "", errors.New("outside of the repository: set UN_CACHE to a directory for kernels")
}
