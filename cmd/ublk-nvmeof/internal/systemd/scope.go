package systemd

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// scopePrefix begins the names of the scopes of servers in the background.
const scopePrefix = "ublk-nvmeof-"

// Booted reports whether systemd is the system's service manager (sd_booted(3)).
func Booted() bool {
	info, err := os.Lstat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// ShuttingDown reports whether the machine is being shut down. Only root can ask. Where systemd
// does not run, the answer is no.
func ShuttingDown(ctx context.Context) (bool, error) {
	if os.Getuid() != 0 || !Booted() {
		return false, nil
	}
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return false, fmt.Errorf("connect to systemd: %w", err)
	}
	defer c.Close()
	p, err := c.SystemStateContext(ctx)
	if err != nil {
		return false, fmt.Errorf("get the state of the system: %w", err)
	}
	return p.Value.Value() == "stopping", nil
}

// MoveToScope puts a process of root into a scope of its own, so that the end of the
// session or of the service that has started it does not end it. When the machine is shut
// down, the scope is stopped after network file systems are unmounted.
func MoveToScope(ctx context.Context, pid int, description string) error {
	name := fmt.Sprintf("%s%d.scope", scopePrefix, pid)
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to systemd: %w", err)
	}
	defer c.Close()
	property := func(name string, v any) dbus.Property {
		return dbus.Property{Name: name, Value: godbus.MakeVariant(v)}
	}
	done := make(chan string, 1)
	_, err = c.StartTransientUnitContext(ctx, name, "fail", []dbus.Property{
		property("PIDs", []uint32{uint32(pid)}),
		property("Description", description),
		property("DefaultDependencies", false),
		property("Wants", []string{"remote-fs-pre.target"}),
		property("Before", []string{"remote-fs-pre.target", "shutdown.target"}),
		property("Conflicts", []string{"shutdown.target"}),
		property("CollectMode", "inactive-or-failed"),
		// A server whose device is in use serves it until the end of the machine.
		property("SendSIGKILL", false),
	}, done)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("start %s: %s", name, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start %s: %w", name, context.Cause(ctx))
	}
}

// InOwnScope reports whether MoveToScope has moved this process.
func InOwnScope() bool {
	text, err := os.ReadFile("/proc/self/cgroup")
	return err == nil && inOwnScope(string(text), os.Getpid())
}

// inOwnScope looks for the scope in the contents of /proc/PID/cgroup.
func inOwnScope(cgroups string, pid int) bool {
	want := fmt.Sprintf("/%s%d.scope", scopePrefix, pid)
	for line := range strings.Lines(cgroups) {
		if strings.HasSuffix(strings.TrimSpace(line), want) {
			return true
		}
	}
	return false
}
