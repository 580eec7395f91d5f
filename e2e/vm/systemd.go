package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// agentName is the first argument of the process that runs the command beside systemd.
// systemd spares processes whose name begins so when it kills what is left at the end
// (systemd.io/ROOT_STORAGE_DAEMONS).
const agentName = "@vm-agent"

// The agent's descriptors: the control port and its configuration.
const (
	agentPort   = 3
	agentConfig = 4
)

// pipeSize is what a pipe takes before it is read.
const pipeSize = 64 << 10

// becomeSystemd runs the script, starts the agent, and makes this process systemd.
func becomeSystemd(port *os.File, c guestConfig) error {
	if err := forgetHost(c.Disk); err != nil {
		return err
	}
	// What makes systemd believe that the machine is a container.
	if err := os.Remove("/.dockerenv"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Emptying the host's /tmp takes long, because all of it is behind the 9p file system.
	if err := os.MkdirAll("/etc/tmpfiles.d", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/etc/tmpfiles.d/tmp.conf", nil, 0o644); err != nil {
		return err
	}
	// The script has as long as the command.
	if err := writeFrame(port, frameReady, nil); err != nil {
		return err
	}
	before := exec.Command(c.Before)
	before.Dir, before.Env = c.Dir, append(c.Env, "PWD="+c.Dir)
	if out, err := before.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(c.Before), err, out)
	}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	config, w, err := os.Pipe()
	if err != nil {
		return err
	}
	if len(text) > pipeSize {
		return fmt.Errorf("the configuration has %d bytes; want at most %d", len(text), pipeSize)
	}
	if _, err := w.Write(text); err != nil {
		return err
	}
	w.Close()
	_, err = os.StartProcess("/proc/self/exe", []string{agentName}, &os.ProcAttr{
		Dir: "/", Env: c.Env, Files: []*os.File{nil, os.Stdout, os.Stderr, port, config},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	return fmt.Errorf("become systemd: %w", unix.Exec("/lib/systemd/systemd", []string{"systemd"}, c.Env))
}

// knownDisk exists on a disk that has been booted from.
const knownDisk = "/var/lib/vm-disk"

// forgetHost takes away what is enabled on the host, and its file systems. A disk that has been
// booted from has its own.
func forgetHost(disk bool) error {
	const units = "/etc/systemd/system"
	if !disk {
		return errors.Join(mount("tmpfs", "units", units, "mode=755"), os.WriteFile("/etc/fstab", nil, 0o644))
	}
	if _, err := os.Stat(knownDisk); err == nil {
		return nil
	}
	return errors.Join(os.RemoveAll(units), os.Mkdir(units, 0o755), os.WriteFile("/etc/fstab", nil, 0o644), os.WriteFile(knownDisk, nil, 0o644))
}

// agentMain runs the command and then shuts the machine down.
func agentMain() {
	port := os.NewFile(agentPort, "control")
	var c guestConfig
	err := json.NewDecoder(os.NewFile(agentConfig, "config")).Decode(&c)
	if err == nil {
		err = guestCommand(port, c)
	}
	if err != nil {
		_ = writeFrame(port, frameFail, []byte(err.Error())) // or the host sees the machine end
	}
	if out, err := exec.Command("systemctl", "--no-block", "reboot").CombinedOutput(); err != nil {
		fmt.Printf("vm: shut down: %v: %s\n", err, out)
	}
	for {
		_ = unix.Pause() // the end of the machine ends it
	}
}
