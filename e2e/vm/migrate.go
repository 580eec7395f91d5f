package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	writerReports  = 6                // how many to see before the migration, and after it
	writerLimit    = 60 * time.Second // for each of these
	migrationLimit = 3 * time.Minute
	qmpLimit       = 20 * time.Second // for an answer of QEMU, and until it listens
)

// migrate runs the writer, migrates it to another QEMU and sees it go on.
func (m *machine) migrate(to string) (int, error) {
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		return exitVM, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := unpackModules(m.kernel.modules, filepath.Join(dir, "boot"), []string{"virtio_pci", "virtio_blk"}); err != nil {
		return exitVM, err
	}
	modules, err := filepath.Glob(filepath.Join(dir, "boot", "*.ko"))
	if err != nil {
		return exitVM, err
	}
	m.guest.Writer = true
	initrd := filepath.Join(dir, "initramfs")
	if err := m.writeInitramfs(initrd, modules); err != nil {
		return exitVM, err
	}
	channel := filepath.Join(dir, "channel")
	from, err := m.startSource(initrd, filepath.Join(dir, "from"))
	if err != nil {
		return exitVM, fmt.Errorf("before the migration: %w", err)
	}
	defer from.kill()
	onto, err := m.startMovable(initrd, to, filepath.Join(dir, "to"), "-incoming", "unix:"+channel)
	if err != nil {
		return exitVM, err
	}
	defer onto.kill()
	if err := from.moveTo(channel, m); err != nil {
		return exitVM, errors.Join(err, onto.complaint())
	}
	if err := onto.awaitReports(); err != nil {
		return exitVM, fmt.Errorf("after the migration: %w", err)
	}
	return 0, nil
}

// startSource starts the writer.
func (m *machine) startSource(initrd, path string) (*movable, error) {
	for attempt := 1; ; attempt++ {
		q, err := m.startMovable(initrd, m.disks[0], path)
		if err != nil {
			return nil, err
		}
		if err = q.awaitReports(); err == nil {
			return q, nil
		}
		q.kill()
		if attempt == bootAttempts || errors.Is(err, errWrong) {
			return nil, err
		}
		fmt.Fprintf(m.stderr, "vm: attempt %d of %d: %v\n", attempt, bootAttempts, err)
	}
}

// errWrong means that the writer has read something wrong.
var errWrong = errors.New("wrong data")

// movable is a QEMU that can migrate.
type movable struct {
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	lines  chan string // of the console
	conn   *os.File    // QMP
	qmp    *json.Decoder
}

func (m *machine) startMovable(initrd, disk, path string, more ...string) (*movable, error) {
	args := append(m.basic(initrd), m.diskArguments([]string{disk})...)
	args = append(args, "-serial", "stdio", "-qmp", "unix:"+path+",server=on,wait=off")
	q := &movable{cmd: exec.Command("qemu-system-x86_64", append(args, more...)...), stderr: new(bytes.Buffer), lines: make(chan string, 1000)}
	q.cmd.Stderr = q.stderr
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	out, err := q.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := q.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(q.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			fmt.Fprintln(m.stderr, filepath.Base(path)+":", s.Text())
			q.lines <- strings.TrimSpace(s.Text())
		}
	}()
	for end := time.Now().Add(qmpLimit); ; time.Sleep(20 * time.Millisecond) {
		if q.conn, err = dialUnix(path); err == nil {
			break
		}
		if time.Now().After(end) {
			q.kill()
			return nil, errors.Join(err, q.complaint())
		}
	}
	q.qmp = json.NewDecoder(q.conn)
	return q, q.execute("qmp_capabilities", nil, nil)
}

// dialUnix connects to a unix socket. Package net would need libraries, which the guest has not.
func dialUnix(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to %s: %w", path, err), unix.Close(fd))
	}
	if err := unix.SetNonblock(fd, true); err != nil { // for deadlines
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (q *movable) kill() {
	_ = q.cmd.Process.Kill()
	_ = q.cmd.Wait()
	if q.conn != nil {
		_ = q.conn.Close()
	}
}

// complaint is what QEMU has written to standard error.
func (q *movable) complaint() error {
	if text := bytes.TrimSpace(q.stderr.Bytes()); len(text) > 0 {
		return fmt.Errorf("QEMU: %s", text)
	}
	return nil
}

// awaitReports waits until the writer has reported some times.
func (q *movable) awaitReports() error {
	limit := time.After(writerLimit)
	for n := 0; n < writerReports; {
		select {
		case line, ok := <-q.lines:
			switch {
			case !ok:
				_ = q.cmd.Wait()
				return errors.Join(errors.New("QEMU has ended"), q.complaint())
			case strings.Contains(line, writerWrong):
				return fmt.Errorf("%w: %s", errWrong, line)
			case strings.Contains(line, writerReport):
				n++
			}
		case <-limit:
			return errors.Join(fmt.Errorf("%d reports of the writer within %v, want %d", n, writerLimit, writerReports), q.complaint())
		}
	}
	return nil
}

// execute executes a QMP command.
func (q *movable) execute(name string, arguments, result any) error {
	if err := q.conn.SetDeadline(time.Now().Add(qmpLimit)); err != nil {
		return err
	}
	command := map[string]any{"execute": name}
	if arguments != nil {
		command["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(command); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for {
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := q.qmp.Decode(&answer); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", name, err), q.complaint())
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("%s: %s", name, answer.Error.Desc)
		case answer.Return == nil: // a greeting or an event
		case result != nil:
			return json.Unmarshal(answer.Return, result)
		default:
			return nil
		}
	}
}

// moveTo migrates to the QEMU that listens at a path.
func (q *movable) moveTo(path string, m *machine) error {
	limits := map[string]any{"max-bandwidth": 1 << 30, "downtime-limit": 1000}
	if err := q.execute("migrate-set-parameters", limits, nil); err != nil {
		return err
	}
	if err := q.execute("migrate", map[string]any{"uri": "unix:" + path}, nil); err != nil {
		return err
	}
	var info struct {
		Status    string
		Total     int    `json:"total-time"`
		Downtime  int    `json:"downtime"`
		ErrorDesc string `json:"error-desc"`
		RAM       struct {
			Passes      int `json:"dirty-sync-count"`
			Transferred int64
		}
	}
	for end := time.Now().Add(migrationLimit); info.Status != "completed"; time.Sleep(100 * time.Millisecond) {
		if err := q.execute("query-migrate", nil, &info); err != nil {
			return err
		}
		if info.Status == "failed" || info.Status == "cancelled" || time.Now().After(end) {
			return errors.Join(fmt.Errorf("migration %s: %s", info.Status, info.ErrorDesc), q.complaint())
		}
	}
	fmt.Fprintf(m.stdout, "migrated in %d ms with %d ms of standstill, %d MiB in %d passes\n",
		info.Total, info.Downtime, info.RAM.Transferred>>20, info.RAM.Passes)
	return nil
}
