package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/process"
	"ublk-nvmeof/ublk"
)

// ioUring makes an io_uring.
type ioUring struct{}

func (ioUring) Name() string { return "io_uring" }

func (ioUring) Look(_ context.Context, m *Machine) Result {
	err := m.IOUring()
	var ring *process.RingError
	switch {
	case err == nil:
		return ok("can be used")
	case errors.As(err, &ring):
		return fail(exit.Of(err), ring.Remedy, "cannot be used: %s", ring.Why)
	}
	return fail(exit.Of(err), "", "%v", err)
}

// ublkDriver asks the ublk driver for its features.
type ublkDriver struct{}

func (ublkDriver) Name() string { return "ublk" }

func (d ublkDriver) Look(ctx context.Context, m *Machine) Result {
	o := m.Options
	if o.Frontend == options.NBD || o.Frontend == options.NBDSocket {
		return ok("not needed for --frontend %s", o.Frontend)
	}
	if !m.exists("dev/ublk-control") {
		switch {
		case !m.loadable("ublk_drv"):
			return d.without(m, exit.NoUblk, "use a kernel with CONFIG_BLK_DEV_UBLK", "Linux %s has no module ublk_drv", m.Release)
		case o.LoadModules == "never":
			return d.without(m, exit.NoUblk, "modprobe ublk_drv", "ublk_drv is not loaded, and --load-modules=never is given")
		case !m.Admin():
			return d.without(m, exit.Permission, "become root", "ublk_drv is not loaded, which needs root")
		}
		return ok("ublk_drv is not loaded; connect loads it")
	}
	f, err := m.Features(ctx)
	switch {
	case errors.Is(err, ublk.ErrPermission) || err == nil && !m.Admin():
		return d.without(m, exit.Permission, "become root", "this user may not make block devices, which needs CAP_SYS_ADMIN")
	case err != nil:
		return d.without(m, exit.Of(err), "use a kernel since Linux 6.5", "%v", err)
	}
	if want := neededFeatures(o.OnCrash); !f.Has(want) {
		return fail(exit.Other, "use a newer kernel, or --on-crash "+options.Remove, "the driver has no %v, which --on-crash %s needs", want&^f, o.OnCrash)
	}
	return ok("%s", describeFeatures(f))
}

// without is the result if there is no ublk driver: a failure if it was asked for.
func (ublkDriver) without(m *Machine, code exit.Code, remedy, format string, args ...any) Result {
	r := fail(code, remedy, format, args...)
	if m.Options.Frontend == options.Ublk {
		return r
	}
	r.Status, r.Code = Warn, 0
	if m.NBD() && m.Admin() {
		r.Finding += ", so devices are /dev/nbdN, whose I/O fails when their server dies"
	} else {
		r.Finding += ", so there are no block devices but only sockets for NBD clients"
	}
	return r
}

// neededFeatures are those that a value of --on-crash needs.
func neededFeatures(onCrash string) ublk.Features {
	switch onCrash {
	case options.Requeue:
		return ublk.UserRecovery | ublk.RecoveryReissue
	case options.Fail:
		return ublk.UserRecovery | ublk.RecoveryFailIO
	}
	return 0
}

// describeFeatures says what the features are good for.
func describeFeatures(f ublk.Features) string {
	has := func(want ublk.Features) string {
		if f.Has(want) {
			return "yes"
		}
		return "no"
	}
	return fmt.Sprintf("the driver is there (features %#x; recovery %s, upgrade without a second try of requests %s, resize %s)",
		uint64(f), has(ublk.UserRecovery|ublk.RecoveryReissue), has(ublk.Quiesce), has(ublk.UpdateSize))
}

// ublkLimit looks for room for one more ublk device.
type ublkLimit struct{}

func (ublkLimit) Name() string { return "ublks_max" }

// onlyUsers is the first version of which every driver counts the devices of users without
// CAP_SYS_ADMIN only. Older versions may have the change or not, and do not tell.
var onlyUsers = []int{6, 15}

func (ublkLimit) Look(_ context.Context, m *Machine) Result {
	const parameter = "sys/module/ublk_drv/parameters/ublks_max"
	most, err := strconv.Atoi(m.read(parameter))
	switch {
	case err != nil:
		return Result{} // the driver is not loaded, or has no such parameter (before Linux 6.3)
	case slices.Compare(versionOf(m.Release), onlyUsers) >= 0:
		return ok("%d, which does not count the devices of root", most)
	}
	used := len(m.glob("sys/class/ublk-char/*"))
	if used+max(1, most/8) > most {
		return warn(fmt.Sprintf("echo %d > /%s", max(256, 4*most), parameter),
			"%d ublk devices exist, and %d may, if this driver counts those of root (before Linux 6.15 it can)", used, most)
	}
	return ok("%d of at most %d ublk devices exist", used, most)
}

// lockedMemory compares RLIMIT_MEMLOCK with what a server locks.
type lockedMemory struct{}

func (lockedMemory) Name() string { return "memlock" }

func (lockedMemory) Look(_ context.Context, m *Machine) Result {
	l, err := m.Limit(unix.RLIMIT_MEMLOCK)
	switch {
	case err != nil:
		return fail(exit.Other, "", "read the limit: %v", err)
	case m.MayLock():
		return ok("no limit, because of CAP_IPC_LOCK")
	case l.Cur == unix.RLIM_INFINITY:
		return ok("no limit")
	}
	o := m.Options
	need := uint64(m.loops()) * process.LoopMemory << 10
	what := fmt.Sprintf("%d queues", m.loops())
	if o.Provider == options.Verbs || o.Provider == options.AutoProvider && len(m.rdmaDevices()) > 0 {
		need += uint64(m.loops()) * uint64(o.QueueSize) * uint64(o.MaxIO)
		what += " and the registered buffers of one namespace"
	}
	if l.Cur < need {
		return fail(exit.Other, "raise it (ulimit -l, LimitMEMLOCK= of a service, --ulimit memlock= of a container), or use fewer or smaller queues (-i, -Q, --max-io-size)",
			"this user may lock %s, and %s take about %s", humanize.IBytes(l.Cur), what, humanize.IBytes(need))
	}
	return ok("%s, of which %s take about %s", humanize.IBytes(l.Cur), what, humanize.IBytes(need))
}

// openFiles compares RLIMIT_NOFILE with what a server opens.
type openFiles struct{}

func (openFiles) Name() string { return "nofile" }

// Descriptors: of a server, of each of its loops, and the limit that leaves room for many
// devices and NBD clients.
const (
	filesOfServer = 32
	filesOfLoop   = 16
	filesEnough   = 1024
)

func (openFiles) Look(_ context.Context, m *Machine) Result {
	l, err := m.Limit(unix.RLIMIT_NOFILE)
	if err != nil {
		return fail(exit.Other, "", "read the limit: %v", err)
	}
	const remedy = "raise it (ulimit -n, LimitNOFILE= of a service, --ulimit nofile= of a container)"
	need := uint64(filesOfServer + filesOfLoop*m.loops())
	switch {
	case l.Cur < need:
		return fail(exit.Other, remedy, "a process may open %d files, and a server of %d queues opens up to %d", l.Cur, m.loops(), need)
	case l.Cur < filesEnough:
		return warn(remedy, "a process may open %d files, and each device and each NBD client takes one or more", l.Cur)
	}
	return ok("a process may open %d files", l.Cur)
}

// leaseTimes compares how long I/O can stand still with what users of leases on disks
// tolerate.
type leaseTimes struct{}

func (leaseTimes) Name() string { return "lease_times" }

// leaseHolders are programs that lose their leases, and reset the machine, when I/O stands
// still for too long.
var leaseHolders = []struct {
	program string   // as in /proc/PID/comm
	files   []string // its configuration
	key     string
	seconds int // default
	factor  int // the limit is so many times the value
}{
	{"sanlock", []string{"etc/sanlock/sanlock.conf"}, "io_timeout", 10, 8}, // id_renewal_fail_seconds
	{"sbd", []string{"etc/default/sbd", "etc/sysconfig/sbd"}, "SBD_WATCHDOG_TIMEOUT", 5, 1},
}

// standstill is the longest time, in keep alive timeouts, for which I/O stands still after
// an outage that nobody notices: until the target has ended the controller.
const standstill = 3

func (leaseTimes) Look(_ context.Context, m *Machine) Result {
	keepAlive := int(m.Options.KeepAlive.Seconds())
	for _, s := range m.Servers {
		keepAlive = max(keepAlive, s.KeepAlive)
	}
	running := map[string]bool{}
	for _, name := range m.glob("proc/[0-9]*/comm") {
		running[m.read(name)] = true
	}
	var found []string
	for _, h := range leaseHolders {
		if !running[h.program] {
			continue
		}
		limit := h.factor * m.setting(h.files, h.key, h.seconds)
		if limit <= standstill*keepAlive {
			return warn(fmt.Sprintf("connect with --keep-alive-tmo %d, or raise %s", max(1, (limit-1)/standstill), h.key),
				"%s gives up when I/O stands still for %d s, and after a silent outage it can do so for %d s (%d times the keep alive timeout)",
				h.program, limit, standstill*keepAlive, standstill)
		}
		found = append(found, fmt.Sprintf("%s waits %d s", h.program, limit))
	}
	if len(found) == 0 {
		return ok("no user of leases on disks runs (sanlock, sbd)")
	}
	return ok("%s, and a silent outage takes at most %d s", strings.Join(found, ", "), standstill*keepAlive)
}

// setting returns the number that a configuration gives for a key.
func (m *Machine) setting(files []string, key string, otherwise int) int {
	for _, name := range files {
		for line := range strings.Lines(m.text(name)) {
			k, v, found := strings.Cut(strings.TrimSpace(line), "=")
			if !found || strings.TrimSpace(k) != key {
				continue
			}
			if n, err := strconv.Atoi(strings.Trim(strings.TrimSpace(v), `"'s`)); err == nil && n > 0 {
				return n
			}
		}
	}
	return otherwise
}
