package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// self is a path to this program, even if its file was replaced meanwhile. Its
// own path is better: ps calls threads by its last part.
func self() string {
	const link = "/proc/self/exe"
	running, err := os.Stat(link)
	if err != nil {
		return link
	}
	path, err := os.Executable()
	if err != nil {
		return link
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(now, running) {
		return link
	}
	return path
}

// undoTime is what a server gets, beyond its own timeout, to undo what it did.
const undoTime = 30 * time.Second

// report is what a server tells the connect that started it, once.
type report struct {
	Status *control.Status `json:"status,omitempty"`
	Error  *exit.Error     `json:"error,omitempty"`
}

// reporter is the server's end. Not being heard ends a server that has just
// become ready: nobody knows of its devices.
type reporter struct{ file *os.File }

func (r *reporter) ready(s control.Status) error { return r.send(report{Status: &s}) }

// failed is the last thing that a server does. After ready it does nothing.
func (r *reporter) failed(err *exit.Error) error { return r.send(report{Error: err}) }

func (r *reporter) send(m report) error {
	if r.file == nil {
		return nil
	}
	err := json.NewEncoder(r.file).Encode(m)
	err = errors.Join(err, r.file.Close())
	r.file = nil
	return err
}

// launch starts a server in a session of its own, and returns what it says of
// itself when its devices are usable. Otherwise nothing of it is left. The
// calling thread's marks are the server's.
func launch(path string, args []string, timeout time.Duration) (control.Status, error) {
	ctx, stop := interruptible(endSignals...)
	defer stop()
	r, w, err := os.Pipe()
	if err != nil {
		return control.Status{}, fmt.Errorf("start server: %w", err)
	}
	defer r.Close()
	cmd := exec.Cmd{
		Path: path, Args: append(args, "--report-fd=3"), Dir: "/",
		Env: withoutNotify(os.Environ()), Stderr: os.Stderr, ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return control.Status{}, fmt.Errorf("start server: %w", err)
	}
	heard := make(chan report, 1)
	go func() {
		var m report
		if text, err := io.ReadAll(r); err == nil {
			_ = json.Unmarshal(text, &m) // whatever it is, it is no report
		}
		heard <- m
	}()
	m, err := await(ctx, heard, cmd.Process, timeout)
	switch {
	case err != nil:
		_ = cmd.Wait() // err says more
		return control.Status{}, err
	case m.Status != nil:
		return *m.Status, cmd.Process.Release()
	case m.Error != nil:
		_ = cmd.Wait() // m.Error says more
		return control.Status{}, m.Error
	}
	// It died. What it had to say about that is on standard error, or in its log.
	return control.Status{}, fmt.Errorf("the server died: %w", errors.Join(cmd.Wait(), errDied))
}

var errDied = errors.New("it reported nothing")

// withoutNotify keeps a server in the background from speaking for the service
// that started it.
func withoutNotify(env []string) []string {
	return slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, "NOTIFY_SOCKET=") })
}

// await waits for the report of a server. A signal is passed on, and a server
// that does not come to an end is killed.
func await(ctx context.Context, heard <-chan report, p *os.Process, timeout time.Duration) (report, error) {
	limit := time.NewTimer(timeout + undoTime)
	defer limit.Stop()
	interrupted := ctx.Done()
	for {
		select {
		case m := <-heard:
			return m, nil
		case <-interrupted:
			interrupted = nil
			_ = p.Signal(syscall.SIGTERM) // it may have ended
		case <-limit.C:
			_ = p.Kill()
			return report{}, exit.Errorf(exit.Timeout, "the server did not get ready, and was killed")
		}
	}
}
