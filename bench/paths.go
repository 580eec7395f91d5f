package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/ublk"
)

// The target of e2e/lab.sh.
const (
	targetNQN     = "nqn.2026-01.org.example:lab"
	targetAddress = "10.0.2.15"
	targetService = "4420"
)

// portPair is a subsystem with two ports, which one of the paths below is connected to.
type portPair struct {
	path, nqn string
	services  [2]string
	share     int // of each port in the queues
}

var portPairs = []portPair{
	{pathTwoPaths, "nqn.2026-01.org.example:two", [2]string{"4421", "4422"}, 2},
	{pathTwoPathsWide, "nqn.2026-01.org.example:wide", [2]string{"4423", "4424"}, 1},
}

func connectPair(pair portPair) func(context.Context, plan) (*disk, error) {
	return func(ctx context.Context, p plan) (*disk, error) {
		return connectOurs(ctx, p, pair.nqn, pair.services[0], "--path", targetAddress+","+pair.services[1])
	}
}

// stepTimeout bounds connecting, disconnecting and their like; in mode icount it
// is virtual time.
const stepTimeout = 60 * time.Second

// disk is a connected path: a block device, and who serves it.
type disk struct {
	node   string // /dev/…
	server int    // pid, 0 for the kernel
	close  func(context.Context) error
	prefix []string              // of the command that runs fio
	memory string                // of fio (--mem); "": its own
	beside func(context.Context) // runs while the disk is under load; may be nil
}

// path is one way to a block device.
type path struct {
	name    string
	module  string // that the kernel needs
	connect func(context.Context, plan) (*disk, error)
}

// The paths by name; oursPoll is ours with poll queues besides, scraped is ours whose metrics are
// read each second, shared is ours
// with memory that fio shares, -huge is with memory in pages of 2 MiB, and busy is ours on a machine whose operator is busy. twoPaths is ours over two ports of the target, which grants each of them half
// of the queues, and twoPathsWide over two ports with all queues each.
const (
	pathKernel         = "kernel"
	pathOurs           = "ours"
	pathNull           = "null"
	pathOursPoll       = "ours-poll"
	pathScraped        = "scraped"
	pathShared         = "shared"
	pathSharedHuge     = "shared-huge"
	pathOursHuge       = "ours-huge"
	pathNullHuge       = "null-huge"
	pathNullShared     = "null-shared"
	pathNullSharedHuge = "null-shared-huge"
	pathBusy           = "busy"
	pathTwoPaths       = "two-paths"
	pathTwoPathsWide   = "two-paths-wide"
)

var paths = []path{
	{pathKernel, "nvme-rdma", connectKernel},
	{pathOurs, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) { return connectOurs(ctx, p, targetNQN, targetService) }},
	{pathNull, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) { return connectNull(ctx, p) }},
	{pathNullHuge, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) { return withHugePages(connectNull(ctx, p)) }},
	{pathNullShared, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) { return connectNull(ctx, p, smallPages) }},
	{pathNullSharedHuge, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) { return connectNull(ctx, p, hugePages) }},
	{pathOursPoll, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) {
		return connectOurs(ctx, p, targetNQN, targetService, "-P", strconv.Itoa(p.Queues))
	}},
	{pathScraped, "ublk_drv", connectScraped},
	{pathOursHuge, "ublk_drv", func(ctx context.Context, p plan) (*disk, error) {
		return withHugePages(connectOurs(ctx, p, targetNQN, targetService))
	}},
	{pathShared, "ublk_drv", connectShared(pathShared)},
	{pathSharedHuge, "ublk_drv", connectShared(pathSharedHuge, "-huge")},
	{pathBusy, "ublk_drv", connectBusy},
	{pathTwoPaths, "ublk_drv", connectPair(portPairs[0])},
	{pathTwoPathsWide, "ublk_drv", connectPair(portPairs[1])},
}

func pathNames() []string {
	var names []string
	for _, p := range paths {
		names = append(names, p.name)
	}
	return names
}

func pathNamed(name string) (path, error) {
	for _, p := range paths {
		if p.name == name {
			return p, nil
		}
	}
	return path{}, fmt.Errorf("no path %q", name)
}

// pathComponent is a controller's part in the name of a disk that several
// controllers may lead to: nvme0c1n1 is a path of nvme0n1.
var pathComponent = regexp.MustCompile(`c\d+n`)

func connectKernel(ctx context.Context, p plan) (*disk, error) {
	out, err := command(ctx, "nvme", "connect", "-t", "rdma", "-a", targetAddress, "-s", targetService,
		"-n", targetNQN, "-i", strconv.Itoa(p.Queues), "-o", "json")
	if err != nil {
		return nil, err
	}
	var reply struct{ Device string }
	if err := json.Unmarshal(out, &reply); err != nil || reply.Device == "" {
		return nil, fmt.Errorf("nvme connect: no device in %q", out)
	}
	d := &disk{close: func(ctx context.Context) error {
		_, err := command(ctx, "nvme", "disconnect", "-d", reply.Device)
		return err
	}}
	// nvme-cli returns before the namespaces are scanned.
	err = poll(ctx, func() (bool, error) {
		found, err := filepath.Glob("/sys/class/nvme/" + reply.Device + "/nvme*n1")
		if err != nil || len(found) == 0 {
			return false, err
		}
		d.node = "/dev/" + pathComponent.ReplaceAllString(filepath.Base(found[0]), "n")
		_, err = transferred(d.node)
		return err == nil, nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the namespace of %s: %w", reply.Device, err), d.close(ctx))
	}
	return d, nil
}

var ublkNode = regexp.MustCompile(`/dev/ublkb(\d+)`)

func connectOurs(ctx context.Context, p plan, nqn, service string, more ...string) (*disk, error) {
	args := append([]string{"connect", "-t", "rdma", "-a", targetAddress, "-s", service,
		"-n", nqn, "-i", strconv.Itoa(p.Queues), "--duplicate-connect"}, more...)
	if p.Devices > 1 {
		args = append(args, "--max-io-size=64KiB") // their buffers have to fit into the VM
	}
	out, err := command(ctx, p.Ours, args...)
	if err != nil {
		return nil, err
	}
	d, err := ublkDisk(ctx, out)
	if err != nil {
		return nil, fmt.Errorf("%s connect: %w", p.Ours, err)
	}
	d.close = func(ctx context.Context) error {
		if _, err := command(ctx, p.Ours, "disconnect", "-d", d.node); err != nil {
			return err
		}
		return gone(ctx, d.server)
	}
	return d, nil
}

// metricsAddress is where the path scraped has its metrics.
const metricsAddress = "127.0.0.1:9471"

func connectScraped(ctx context.Context, p plan) (*disk, error) {
	d, err := connectOurs(ctx, p, targetNQN, targetService, "--metrics-listen", metricsAddress)
	if err == nil {
		d.beside = scrapeEachSecond
	}
	return d, err
}

// scrapeEachSecond reads the metrics as Prometheus does, each second until ctx is done.
func scrapeEachSecond(ctx context.Context) {
	for sleep(ctx, time.Second) == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddress+"/metrics", nil)
		if err != nil {
			panic(err) // the address is a constant
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			continue
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}

// sharedMiB is the size of the memory that fio shares.
const sharedMiB = 16

// connectShared returns a function that connects a disk whose users share the memory of their I/O, so
// that nothing is copied. options are those of sharemem.
func connectShared(name string, options ...string) func(context.Context, plan) (*disk, error) {
	return func(ctx context.Context, p plan) (*disk, error) {
		socket := "/run/bench-" + name + ".sock"
		d, err := connectOurs(ctx, p, targetNQN, targetService, "--namespace", "1", "--shmem-socket", socket)
		if err == nil {
			d.prefix = append([]string{filepath.Join(filepath.Dir(p.Ours), "sharemem")}, options...)
			d.prefix, d.memory = append(d.prefix, socket, strconv.Itoa(sharedMiB)), "mmapshared:{}"
		}
		return d, err
	}
}

// Pages of memory that fio does I/O from
const (
	smallPages = "small" // 4 KiB
	hugePages  = "huge"  // 2 MiB
)

// withHugePages makes fio do I/O from memory of its own in huge pages.
func withHugePages(d *disk, err error) (*disk, error) {
	if err == nil {
		d.memory = "shmhuge"
	}
	return d, err
}

// reserveHugePages reserves memory for the paths that need such pages.
func reserveHugePages() error {
	return os.WriteFile("/proc/sys/vm/nr_hugepages", []byte("48"), 0o644)
}

// connectBusy is for a disk beside which others are listed and connected.
func connectBusy(ctx context.Context, p plan) (*disk, error) {
	d, err := connectOurs(ctx, p, targetNQN, targetService)
	if err == nil {
		d.beside = func(during context.Context) {
			for sleep(during, time.Second) == nil {
				operate(context.WithoutCancel(ctx), p)
			}
		}
	}
	return d, err
}

// operate lists the devices, and connects another one and disconnects it. Whether it succeeds
// does not matter, because only the disk under load is measured.
func operate(ctx context.Context, p plan) {
	_, _ = command(ctx, p.Ours, "list", "-v")
	if other, err := connectOurs(ctx, p, targetNQN, targetService); err == nil {
		_ = other.close(ctx)
	}
}

func connectNull(ctx context.Context, p plan, more ...string) (*disk, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, append([]string{"null", strconv.Itoa(p.Queues), strconv.Itoa(p.SizeMiB)}, more...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("start null server: %w", errors.Join(err, cmd.Wait()))
	}
	d, err := ublkDisk(ctx, line)
	if err != nil {
		return nil, fmt.Errorf("start null server: %w", errors.Join(err, cmd.Process.Kill(), cmd.Wait()))
	}
	d.close = func(context.Context) error {
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			return err
		}
		return cmd.Wait()
	}
	if words := strings.Fields(string(line)); len(words) > 1 {
		d.memory = "mmapshared:" + words[1]
	}
	return d, nil
}

// ublkDisk finds the first ublk device named in a server's output.
func ublkDisk(ctx context.Context, out []byte) (*disk, error) {
	m := ublkNode.FindSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("no device in %q", out)
	}
	id, err := strconv.Atoi(string(m[1]))
	if err != nil {
		return nil, err
	}
	info, err := ublk.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return &disk{node: string(m[0]), server: info.PID}, nil
}

// command runs a program and gives its standard output; its standard error is
// part of the error.
func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	cmd.WaitDelay = time.Second // a server left behind may hold the pipes
	out, err := cmd.Output()
	if err != nil {
		what := filepath.Base(name)
		if len(args) > 0 {
			what += " " + args[0]
		}
		return nil, fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(complaint.String()))
	}
	return out, nil
}

// gone waits for the end of a process that is not a child.
func gone(ctx context.Context, pid int) error {
	err := poll(ctx, func() (bool, error) { return unix.Kill(pid, 0) == unix.ESRCH, nil })
	if err != nil {
		return fmt.Errorf("wait for the end of process %d: %w", pid, err)
	}
	return nil
}

// poll asks until the answer is yes, at most for stepTimeout.
func poll(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// sleep lets time pass; measuring is its purpose.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
