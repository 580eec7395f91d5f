package systemd

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Assignments for Notify, as sd_notify(3) defines them.
const (
	Ready    = daemon.SdNotifyReady
	Stopping = daemon.SdNotifyStopping
	Watchdog = daemon.SdNotifyWatchdog
)

// Status describes the state of the service in a line. What cannot be printed becomes a
// space.
func Status(text string) string {
	return "STATUS=" + strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}

// MainPID names the process that is the service from now on.
func MainPID(pid int) string { return "MAINPID=" + strconv.Itoa(pid) }

// ExtendTimeout asks for at least d from now on to start or stop.
func ExtendTimeout(d time.Duration) string {
	return "EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(d.Microseconds(), 10)
}

// Reloading says that the service has begun to reload its configuration. Ready ends that.
func Reloading() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // this clock always exists
	return daemon.SdNotifyReloading + "\nMONOTONIC_USEC=" + strconv.FormatInt(now.Nano()/1000, 10)
}

// Managed reports whether a service manager wants to be notified by this process.
func Managed() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Notify sends assignments to the service manager. If the process is not managed, there is
// nothing to do.
func Notify(assignments ...string) error {
	if _, err := daemon.SdNotify(false, strings.Join(assignments, "\n")); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}

// WatchdogTimeout returns the time within which the service manager wants to hear of this
// process again, or 0 if it does not.
func WatchdogTimeout() (time.Duration, error) {
	d, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0, fmt.Errorf("watchdog: %w", err)
	}
	return d, nil
}

// Environment variables that concern one process.
var (
	ofService = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC"}
	ofProcess = []string{"WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
)

// Outside returns env without what would make another process speak for the service.
func Outside(env []string) []string { return without(without(env, ofService), ofProcess) }

// Successor returns the environment of a process that will be the service.
func Successor(env []string) []string { return without(env, ofProcess) }

func without(env, names []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(names, name)
	})
}
