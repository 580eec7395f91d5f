package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/internal/rundir"
)

// self returns the path of this program, or of a link to it if its file has been
// replaced. The path is better because ps shows its last part as the name of a thread.
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

// undoTime is the time that a server has, after its own timeout, to undo its work.
const undoTime = 30 * time.Second

// report is a message of a server to the command that started it.
type report struct {
	Name   string       `json:"name,omitempty"` // of the server
	Log    string       `json:"log,omitempty"`  // path of the server's log
	Wait   *server.Wait `json:"wait,omitempty"` // the current wait of the server
	Status *shown       `json:"status,omitempty"`
	Error  *exit.Error  `json:"error,omitempty"`
}

// reporter is the server's end of the connection to the command that started it, which is
// closed after the status or the error.
type reporter struct{ file *os.File }

// newReporter makes one of an inherited descriptor.
func newReporter(fd int) (*reporter, error) {
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil { // so that close ends a read
		return nil, fmt.Errorf("descriptor %d, to report on: %w", fd, err)
	}
	return &reporter{file: os.NewFile(uintptr(fd), "report")}, nil
}

// abandoned returns a channel that is closed if the command that started the server ends, or
// does not want the server any more, before the last report.
func (r *reporter) abandoned() <-chan struct{} {
	c, file := make(chan struct{}), r.file
	go func() {
		// A command that is killed before it has read all reports resets the connection.
		if _, err := file.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrClosed) {
			close(c)
		}
	}()
	return c
}

// reserved reports the names of the server and of its log.
func (r *reporter) reserved(name, log string) error { return r.send(report{Name: name, Log: log}) }

// waits reports what the server waits for. The server continues if nobody reads that.
func (r *reporter) waits(w server.Wait) { _ = r.send(report{Wait: &w}) }

// ready reports that the devices are usable. A server whose report fails must end if it has
// made its devices, because nobody would know them.
func (r *reporter) ready(s control.Status) error {
	return errors.Join(r.send(report{Status: shownOf(s)}), r.close())
}

// failed reports the error with which the server ends. It does nothing after ready.
func (r *reporter) failed(err *exit.Error) error {
	return errors.Join(r.send(report{Error: err}), r.close())
}

func (r *reporter) send(m report) error {
	if r.file == nil {
		return nil
	}
	return json.NewEncoder(r.file).Encode(m)
}

func (r *reporter) close() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}

// receive reads the messages of a server until the last one, or until the server has
// died. After each message it sends what is known by then. It closes heard at the end.
func receive(r io.Reader, heard chan<- report) {
	defer close(heard)
	var all report
	for d := json.NewDecoder(r); all.Status == nil && all.Error == nil; {
		var m report
		if d.Decode(&m) != nil {
			return // the server has died, or is another program
		}
		all.Name, all.Log = cmp.Or(m.Name, all.Name), cmp.Or(m.Log, all.Log)
		all.Wait, all.Status, all.Error = m.Wait, m.Status, m.Error
		heard <- all
	}
}

// background returns a command of this program that continues when the session of the
// caller ends. The command runs in its own session and inherits only standard error,
// and out and secrets as its descriptors from 3 on.
func background(path string, args []string, out *os.File, secrets []*os.File) (*exec.Cmd, error) {
	if err := host.CloseOnExec(); err != nil {
		return nil, err
	}
	return &exec.Cmd{
		Path: path, Args: args,
		Env: systemd.Outside(os.Environ()), Stderr: os.Stderr, ExtraFiles: append([]*os.File{out}, secrets...),
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}, nil
}

// startInBackground runs this program with args in a session of its own. It returns when that
// process has written to its descriptor 3 that it is ready, and closed it. What it wrote goes
// to out, unless that is nil. Until then the process reports errors itself. args are what f
// has parsed; keys in them are handed over. more are further arguments.
func startInBackground(out io.Writer, what string, f *pflag.FlagSet, args []string, more ...string) error {
	args, texts := options.HideSecrets(f, args, firstSecret)
	secrets, err := memoryFiles(texts)
	if err != nil {
		return fmt.Errorf("start %s: %w", what, err)
	}
	defer closeAll(secrets)
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start %s: %w", what, err)
	}
	defer r.Close()
	c, err := background(self(), slices.Concat([]string{programName}, args, more), w, secrets)
	if err != nil {
		return fmt.Errorf("start %s: %w", what, err)
	}
	err = c.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", what, err)
	}
	if out == nil {
		out = io.Discard
	}
	n, err := io.Copy(out, r)
	if n > 0 && err == nil {
		return c.Process.Release()
	}
	err = errors.Join(err, c.Wait())
	if code := c.ProcessState.ExitCode(); code > 0 {
		return exit.Errorf(exit.Code(code), "the %s did not start", what)
	}
	return fmt.Errorf("start %s: %w", what, err)
}

// hangups delivers each SIGHUP, which then does not end the process, until stop is called.
// The end of a session may send one.
func hangups() (c chan os.Signal, stop func()) {
	c = make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// surviveHangup makes this process ignore SIGHUP, which the end of a session may send,
// until stop is called. It is for servers in the background.
func surviveHangup(log *slog.Logger) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	go func() {
		for range c {
			log.Info("SIGHUP is ignored by a server in the background; disconnect, SIGTERM or SIGINT ends it")
		}
	}()
	return func() {
		signal.Stop(c)
		close(c)
	}
}

// launch starts a server in the background and returns its status, as far as it is shown, once its
// devices are usable. After an error nothing is left of the server, and the error has the reason,
// or says how the server died. The server inherits the marks of the calling thread
// (process.SetIOFlusher). say tells the user what the server waits for. timeout is the
// time limit of the server without the waits that it announces. If ctx ends before the
// server is ready, the server gives up what it does; one that is ready stays, and launch
// returns its status. The server inherits secrets as its descriptors from firstSecret on.
func launch(ctx context.Context, path string, args []string, secrets []*os.File, timeout time.Duration, say func(string)) (control.Status, error) {
	r, w, err := socketPair()
	if err != nil {
		return control.Status{}, fmt.Errorf("start server: %w", err)
	}
	defer r.Close()
	cmd, err := background(path, append(args, "--report-fd=3"), w, secrets)
	if err != nil {
		return control.Status{}, errors.Join(fmt.Errorf("start server: %w", err), w.Close())
	}
	cmd.Dir = "/" // the server must not keep a file system busy
	before, unknown := host.OOMKills()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return control.Status{}, fmt.Errorf("start server: %w", err)
	}
	leaveSession(ctx, cmd.Process.Pid)
	heard := make(chan report, 1)
	go receive(r, heard)
	giveUp := func() { _ = r.CloseWrite() } // the server may have ended
	m, err := await(ctx, heard, cmd.Process, giveUp, timeout, say)
	go func() { // receive ends with the server
		for range heard {
		}
	}()
	switch {
	case err != nil:
		_ = cmd.Wait() // err says more
		return control.Status{}, err
	case m.Status != nil:
		go func() { _ = cmd.Wait() }() // a process that stays must not keep the remains of the server
		return m.Status.status(), nil
	case m.Error != nil:
		_ = cmd.Wait() // m.Error says more
		return control.Status{}, m.Error
	}
	if err := cmd.Wait(); cmd.ProcessState == nil {
		return control.Status{}, fmt.Errorf("the server died: %w", err)
	}
	after, err := host.OOMKills()
	memory := memoryLeft
	switch {
	case unknown != nil || err != nil:
		memory = memoryUnknown
	case after > before:
		memory = memoryRanOut
	}
	return control.Status{}, exit.Errorf(exit.Other, "the server died: %s", obituary(cmd.ProcessState, m.Log, memory))
}

// socketPair returns the two ends of a connection. The second one is for a child process.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a pair of sockets: %w", err)
	}
	own, child := os.NewFile(uintptr(fds[0]), "reports"), os.NewFile(uintptr(fds[1]), "report")
	conn, err := net.FileConn(own)
	if cerr := own.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, nil, errors.Join(err, child.Close())
	}
	return conn.(*net.UnixConn), child, nil
}

// scopeTime limits the time to make a scope.
const scopeTime = 5 * time.Second

// leaveSession puts a server in the background into a scope of its own, where systemd runs.
func leaveSession(ctx context.Context, pid int) {
	if os.Getuid() != 0 || !systemd.Booted() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, scopeTime)
	defer cancel()
	if err := systemd.MoveToScope(ctx, pid, "NVMe over Fabrics block devices"); err != nil {
		fmt.Fprintf(os.Stderr, "%s: the server may end with this session, because it has no scope of its own: %v\n", programName, err)
	}
}

// launchSuccessor returns a function for server.Config.Launch.
func launchSuccessor(runDir dirFunc) func(program, succeeds string, flags []string) (int, <-chan error, error) {
	return func(program, succeeds string, flags []string) (int, <-chan error, error) {
		dir, err := runDir()
		if err != nil {
			return 0, nil, err
		}
		record, err := dir.Find(succeeds)
		if err != nil {
			return 0, nil, err
		}
		k, err := keysFrom(record)
		if err != nil {
			return 0, nil, err
		}
		secrets, files, err := k.handOver()
		if err != nil {
			return 0, nil, err
		}
		defer closeAll(files)
		r, w, err := os.Pipe()
		if err != nil {
			return 0, nil, fmt.Errorf("start %s: %w", program, err)
		}
		defer w.Close()
		if err := host.CloseOnExec(); err != nil {
			r.Close()
			return 0, nil, err
		}
		args := append(append(serveArgs(dir), "--succeed="+succeeds, "--report-fd=3"), flags...)
		cmd := &exec.Cmd{
			Path: program, Args: append(args, secrets...), Dir: "/", Env: systemd.Successor(os.Environ()),
			Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: append([]*os.File{w}, files...),
		}
		if err := cmd.Start(); err != nil {
			r.Close()
			return 0, nil, fmt.Errorf("start %s: %w", program, err)
		}
		failed := make(chan error, 1)
		heard := make(chan report)
		go receive(r, heard)
		go func() {
			var m report
			for m = range heard { // until the last one
			}
			r.Close()
			err := cmd.Wait() // this process ends first if all goes well
			if m.Error != nil {
				err = m.Error
			}
			failed <- cmp.Or(err, errors.New("the new server ended"))
		}()
		return cmd.Process.Pid, failed, nil
	}
}

// memory reports whether the kernel killed a process while a server was starting.
type memory uint8

const (
	memoryUnknown memory = iota
	memoryLeft
	memoryRanOut
)

// obituary describes how a server died that has not reported an error itself. log is
// the path of its log, or empty.
func obituary(p *os.ProcessState, log string, m memory) string {
	text := fmt.Sprintf("it ended with exit code %d and reported nothing", p.ExitCode())
	if s, ok := p.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		text = "it was killed by " + unix.SignalName(s.Signal())
		switch {
		case s.Signal() != syscall.SIGKILL:
		case m == memoryUnknown:
			text += ", perhaps because the machine or its control group was out of memory; see the kernel's log"
		case m == memoryRanOut:
			text += ", and the kernel has killed a process meanwhile because memory ran out; a smaller --queue-size, --max-io-size or --nr-io-queues needs less"
		}
	}
	if line := lastLine(log); line != "" {
		text += fmt.Sprintf("; its log ends with: %s", line)
	}
	return text
}

// lastLine returns the last line of a file that is not empty. It reads only the end of
// a long file.
func lastLine(path string) string {
	const most = 4096
	if path == "" {
		return ""
	}
	f, err := rundir.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return "" // the file was never made, or was removed
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd) // after an error the beginning is read
	}
	text, _ := io.ReadAll(io.LimitReader(f, most))
	text = bytes.TrimSpace(text)
	return string(text[bytes.LastIndexByte(text, '\n')+1:])
}

// sayAfter is the time after which a command that waits for a server says why.
const sayAfter = 2 * time.Second

// await waits for the last report of a server. If ctx ends, it sends SIGTERM to the
// server. It kills a server that neither becomes ready nor ends in time.
func await(ctx context.Context, heard <-chan report, p *os.Process, giveUp func(), timeout time.Duration, say func(string)) (report, error) {
	var last report
	limit := time.NewTimer(timeout + undoTime)
	defer limit.Stop()
	quiet := time.NewTimer(sayAfter)
	quiet.Stop()
	defer quiet.Stop()
	interrupted := ctx.Done()
	for {
		select {
		case m, ok := <-heard:
			if !ok {
				return last, nil
			}
			last = m
			if m.Wait != nil {
				limit.Reset(m.Wait.Limit() + timeout + undoTime)
				if quiet.Stop(); m.Wait.For != "" {
					quiet.Reset(sayAfter)
				}
			}
		case <-quiet.C:
			say(fmt.Sprintf("%s %s, up to %v", last.Name, last.Wait.For, last.Wait.Limit()))
		case <-interrupted:
			interrupted = nil
			giveUp()
		case <-limit.C:
			_ = p.Kill()
			return report{}, exit.Errorf(exit.Timeout, "the server did not get ready, and was killed")
		}
	}
}
