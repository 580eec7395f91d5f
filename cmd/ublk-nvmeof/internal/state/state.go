// Package state keeps a directory for each server in a run directory. The directory
// records which target the server serves and which devices belong to it. The record
// outlives the server, so that the devices of a dead server are found, but it does
// not outlive the boot.
//
//	/run/ublk-nvmeof/                  locked (flock) while a server takes its name
//	/run/ublk-nvmeof/ctrl0/state.json  replaced by rename
//	/run/ublk-nvmeof/ctrl0/control.sock
//	/run/ublk-nvmeof/ctrl0/log         of a server in the background
package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/rundir"
)

// SchemaVersion is that of state.json.
const SchemaVersion = 1

const (
	stateFile  = "state.json"
	socketFile = "control.sock"
	logFile    = "log"
	namePrefix = "ctrl"
	lockRetry  = 5 * time.Millisecond
)

// Phase is how far a server has come.
type Phase string

// Phases.
const (
	Connecting Phase = "connecting"
	Live       Phase = "live"
)

// Target is what makes two connections the same.
type Target struct {
	Address netip.AddrPort `json:"address"`
	NQN     string         `json:"nqn"`
	HostNQN string         `json:"hostnqn"`
}

// Kind is what a device is.
type Kind string

// Kinds.
const (
	Ublk      Kind = ""           // /dev/ublkbN
	NBD       Kind = "nbd"        // /dev/nbdN
	NBDSocket Kind = "nbd-socket" // a socket, at URI
)

// Device is a device that belongs to a server. Its number may pass to
// somebody else's device later; the cookie tells them apart (ublk.Info.Cookie,
// nbd.Device.Cookie).
type Device struct {
	Kind   Kind   `json:"kind,omitempty"`
	URI    string `json:"uri,omitempty"` // of NBDSocket, which has no number
	ID     int    `json:"id"`
	Cookie uint64 `json:"cookie"`
	NSID   uint32 `json:"nsid"`
	UUID   string `json:"uuid,omitempty"` // of the namespace, if it has one
}

// Path is the block device's node, or the URI of one that is a socket.
func (d Device) Path() string {
	switch d.Kind {
	case NBD:
		return "/dev/nbd" + strconv.Itoa(d.ID)
	case NBDSocket:
		return d.URI
	}
	return "/dev/ublkb" + strconv.Itoa(d.ID)
}

// Name is the path without the directory.
func (d Device) Name() string { return strings.TrimPrefix(d.Path(), "/dev/") }

// State is what state.json holds.
type State struct {
	SchemaVersion int      `json:"schema_version"`
	Name          string   `json:"name"`
	Process       Process  `json:"process"`
	Phase         Phase    `json:"phase"`
	Target        Target   `json:"target"`
	Args          []string `json:"args"` // flags that give the same connection again
	Devices       []Device `json:"devices"`
	// Controllers are the ids of the controllers at the target that may still
	// work on commands of this server, or of those before it.
	Controllers []uint16 `json:"controllers"`
}

// Dir is a run directory.
type Dir string

// Record is a server's state as List finds it.
type Record struct {
	State
	Alive bool  // the server runs
	Err   error // state.json cannot be read; only Name is known
	dir   string
}

// Socket is the path of the server's control socket.
func (r Record) Socket() string { return filepath.Join(r.dir, socketFile) }

// Remove removes the record. The server must be dead, or be the caller.
func (r Record) Remove() error { return os.RemoveAll(r.dir) }

// List finds all servers, in the order of their names.
func (d Dir) List() ([]Record, error) {
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list servers: %w", err)
	}
	var records []Record
	for _, e := range entries {
		if _, ok := number(e.Name()); !ok || !e.IsDir() {
			continue
		}
		r, err := d.read(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // just made, or just removed
		}
		r.Err = err
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b Record) int {
		x, _ := number(a.Name)
		y, _ := number(b.Name)
		return x - y
	})
	return records, nil
}

// number is the N of ctrlN.
func number(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, namePrefix)
	n, err := strconv.Atoi(digits)
	return n, ok && err == nil && n >= 0
}

func (d Dir) read(name string) (Record, error) {
	r := Record{dir: filepath.Join(string(d), name)}
	r.Name = name
	text, err := os.ReadFile(filepath.Join(r.dir, stateFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r.State); err != nil {
		return r, fmt.Errorf("read %s: %w", filepath.Join(r.dir, stateFile), err)
	}
	if r.SchemaVersion != SchemaVersion {
		err = fmt.Errorf("read %s: schema version %d is not %d", filepath.Join(r.dir, stateFile), r.SchemaVersion, SchemaVersion)
	}
	r.Name = name
	r.Alive = r.Process.Alive()
	return r, err
}

// DuplicateError is a target that a server, which may be about to, connects to.
type DuplicateError struct{ Record Record }

func (e *DuplicateError) Error() string {
	return fmt.Sprintf("%s serves %s at %s already (%s, process %d)",
		e.Record.Name, e.Record.Target.NQN, e.Record.Target.Address, e.Record.Phase, e.Record.Process.PID)
}

// Entry is the caller's own record.
type Entry struct {
	Record
}

// Reserve takes a name for the calling process, which connects to target.
// Unless duplicate is set, a live server with the same target is a
// *DuplicateError, and the record of a dead one whose devices are still there
// passes to the caller, who finds them in the Entry. Records of dead servers are
// removed if reap, which gets each of them, says that nothing of them is left.
func (d Dir) Reserve(ctx context.Context, target Target, args []string, duplicate bool, reap func(context.Context, Record) bool) (*Entry, error) {
	self, err := Of(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := rundir.Make(string(d), 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	unlock, err := d.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	records, err := d.List()
	if err != nil {
		return nil, err
	}
	var heirless *Record
	for _, r := range records {
		switch {
		case r.Err != nil:
		case r.Alive && r.Target == target && !duplicate:
			return nil, &DuplicateError{r}
		case r.Alive:
		case reap(ctx, r):
			if err := r.Remove(); err != nil {
				return nil, fmt.Errorf("remove what %s left: %w", r.Name, err)
			}
		case r.Target == target && !duplicate && heirless == nil:
			heirless = &r
		}
	}
	if heirless != nil {
		return (&Entry{*heirless}).adopt(self, args)
	}
	e := &Entry{Record{State: State{
		SchemaVersion: SchemaVersion, Process: self, Phase: Connecting, Target: target, Args: args,
	}}}
	return e, e.take(d)
}

// Find is the record of a server.
func (d Dir) Find(name string) (Record, error) { return d.read(name) }

// Adopt makes the record of a server that has ended the caller's.
func (d Dir) Adopt(ctx context.Context, name string, args []string) (*Entry, error) {
	self, err := Of(os.Getpid())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := d.read(name)
	switch {
	case err != nil:
		return nil, err
	case r.Alive:
		return nil, fmt.Errorf("%s is served by process %d", name, r.Process.PID)
	}
	return (&Entry{r}).adopt(self, args)
}

// adopt makes a dead server's record that of another process. The caller has the
// lock.
func (e *Entry) adopt(by Process, args []string) (*Entry, error) {
	if err := os.Remove(e.Socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove a dead server's socket: %w", err)
	}
	e.Process, e.Phase, e.Args = by, Connecting, args
	return e, e.Save()
}

// Clear removes the record of a dead server if reap says that nothing of it is
// left, and says whether that is so. It is true, too, if there is no such record.
func (d Dir) Clear(ctx context.Context, name string, reap func(context.Context, Record) bool) (bool, error) {
	unlock, err := d.lock(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := d.read(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, err
	case r.Alive:
		return false, fmt.Errorf("%s is served by process %d", name, r.Process.PID)
	case !reap(ctx, r):
		return false, nil
	}
	return true, r.Remove()
}

// take makes the directory with the first free name. The caller has the lock.
func (e *Entry) take(d Dir) error {
	for n := 0; ; n++ {
		e.Name = namePrefix + strconv.Itoa(n)
		e.dir = filepath.Join(string(d), e.Name)
		err := os.Mkdir(e.dir, 0o755)
		if errors.Is(err, fs.ErrExist) {
			// Without a state it belongs to nobody: its maker, who had the
			// lock, died before writing one.
			if _, err := os.Stat(filepath.Join(e.dir, stateFile)); !errors.Is(err, fs.ErrNotExist) {
				continue
			}
		} else if err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		if err := e.Save(); err != nil {
			return errors.Join(err, e.Remove())
		}
		return nil
	}
}

// Save writes the state, all of it or nothing.
func (e *Entry) Save() error {
	text, err := json.MarshalIndent(e.State, "", "\t")
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	file := filepath.Join(e.dir, stateFile)
	next := file + ".new"
	if err := os.WriteFile(next, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := os.Rename(next, file); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// Log is where the server may log to.
func (e *Entry) Log() string { return filepath.Join(e.dir, logFile) }

// lock keeps other servers from taking a name. The lock ends with the process.
func (d Dir) lock(ctx context.Context) (unlock func(), err error) {
	fd, err := unix.Open(string(d), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { unix.Close(fd) }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			unix.Close(fd)
			return nil, fmt.Errorf("lock run directory: %w", err)
		}
		select {
		case <-time.After(lockRetry):
		case <-ctx.Done():
			unix.Close(fd)
			return nil, fmt.Errorf("lock run directory: %w", context.Cause(ctx))
		}
	}
}
