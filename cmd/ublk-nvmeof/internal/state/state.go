// Package state keeps one directory per server in a run directory. It contains the record
// of the server: its target, its controllers and its devices. A record survives its
// server, so that another server can take over the devices.
//
//	/run/ublk-nvmeof/.lock             held (flock) while records come and go
//	/run/ublk-nvmeof/.controllers.json controllers of servers whose record is gone
//	/run/ublk-nvmeof/ctrl0/state.json  the record, replaced by rename
//	/run/ublk-nvmeof/ctrl0/secrets.json the keys of its connection, for its owner only
//	/run/ublk-nvmeof/ctrl0/control.sock
//	/run/ublk-nvmeof/ctrl0/log         of a server that runs in the background
//
// In a directory that does not depend on the run directory (see Host), servers tell each
// other which controllers targets have made for them:
//
//	/run/ublk-nvmeof/.made/PID-START.json
//
// # What a record is for
//
// Recorded controller ids prevent an old write from overwriting a newer one. A target may
// still execute commands of a dead server, and the next server of the subsystem must wait
// until that server's controllers have ended. So an id is recorded before the first command
// goes to its controller, and stays until the target has ended the controller. If the
// record itself is removed before that, the ids move to .controllers.json.
//
// Targets at several addresses may be separate processes, of which each knows its own
// controllers only. So the address at which a controller was made is a part of its name.
//
// A target that has ended a controller may give its id to any other server of the host. So
// a server also records when its controllers were made. If another server was given the id
// later (Host.GivenLater), the controller has ended.
//
// Recorded devices belong to the server of the record. While they are recorded, no other
// subsystem gets their numbers, names and socket addresses, because clients may still use
// them.
//
// A record is removed when its server ends in order, when a dead server is disconnected,
// when gc finds that none of its devices can be recovered, or when a successor has taken
// over all devices and has replaced the record by its own.
package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/rundir"
)

// SchemaVersion is the version of state.json. Fields may be added to a version; fields
// that a record lacks are unknown.
const SchemaVersion = 1

const (
	stateFile  = "state.json"
	socketFile = "control.sock"
	logFile    = "log"
	namePrefix = "ctrl"
	// maxStateSize is far above the record of the 1024 namespaces that Linux allows
	// a controller.
	maxStateSize = 16 << 20
)

// Phase is the phase of a server's life.
type Phase string

// Phases.
const (
	Connecting Phase = "connecting"
	Live       Phase = "live"
)

// Target identifies a connection: connections with equal Targets are the same.
type Target struct {
	Address netip.AddrPort `json:"address"`
	NQN     string         `json:"nqn"`
	HostNQN string         `json:"hostnqn"`
}

// sameSubsystem reports whether two connections share controller ids. A target
// distinguishes controllers of a subsystem by their ids, and hosts by their names.
func (t Target) sameSubsystem(u Target) bool { return t.NQN == u.NQN && t.HostNQN == u.HostNQN }

// Kind is the kind of a device.
type Kind string

// Kinds.
const (
	Ublk         Kind = ""               // /dev/ublkbN
	NBD          Kind = "nbd"            // /dev/nbdN
	NBDSocket    Kind = "nbd-socket"     // a socket for NBD clients, at URI
	VhostUserBlk Kind = "vhost-user-blk" // a socket for a virtual machine monitor, at Socket
)

// Device is a device that belongs to a server. Another device may have its number later;
// the cookie distinguishes them (ublk.Info.Cookie, nbd.Device.Cookie).
type Device struct {
	Kind Kind   `json:"kind,omitempty"`
	URI  string `json:"uri,omitempty"` // of NBDSocket, which has no number
	// Socket is the path of VhostUserBlk, which has no number, or of the socket for the shared
	// memory of Ublk.
	Socket string `json:"socket,omitempty"`
	// Shared is the memory of a user that the driver has registered; nil: none.
	Shared *SharedMemory `json:"shared_memory,omitempty"`
	ID     int           `json:"id"`
	Cookie uint64        `json:"cookie"`
	NSID   uint32        `json:"nsid"`
	// The identifiers of the namespace, if it has them, and what the users of the
	// device were told about it. Told is zero in records of older versions, which
	// have only the UUID.
	UUID  string `json:"uuid,omitempty"`
	NGUID string `json:"nguid,omitempty"` // hexadecimal
	EUI64 string `json:"eui64,omitempty"` // hexadecimal
	Told  Told   `json:"told,omitzero"`
	// Model and Serial are those of the controller when the device was made.
	Model  string `json:"model,omitempty"`
	Serial string `json:"serial,omitempty"`
}

// SharedMemory identifies memory of a user of a device (ublk.SharedMemory).
type SharedMemory struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Size   int64  `json:"size"`
}

// Told holds the properties of a device that its users saw when it was made. Users may not
// learn of changes, so a successor must keep these properties. Sizes are in bytes.
type Told struct {
	Size          uint64 `json:"size"`
	BlockSize     uint32 `json:"block_size"`
	MaxIO         uint32 `json:"max_io_size"`
	MaxDiscard    uint64 `json:"max_discard_size"`
	MaxZeroes     uint64 `json:"max_write_zeroes_size"`
	VolatileCache bool   `json:"volatile_cache"`
	ReadOnly      bool   `json:"read_only"`
}

// Path returns the path of the block device or socket, or the URI of an NBD export.
func (d Device) Path() string {
	switch d.Kind {
	case NBD:
		return "/dev/nbd" + strconv.Itoa(d.ID)
	case NBDSocket:
		return d.URI
	case VhostUserBlk:
		return d.Socket
	}
	return "/dev/ublkb" + strconv.Itoa(d.ID)
}

// Name returns the path without the directory.
func (d Device) Name() string { return strings.TrimPrefix(d.Path(), "/dev/") }

// check returns an error if the record of a device is not valid.
func (d Device) check() error {
	switch {
	case d.Kind != Ublk && d.Kind != NBD && d.Kind != NBDSocket && d.Kind != VhostUserBlk:
		return fmt.Errorf("kind %q is unknown", d.Kind)
	case d.ID < 0:
		return fmt.Errorf("id %d is negative", d.ID)
	case d.NSID == 0:
		return errors.New("nsid is 0")
	case d.Kind == NBDSocket && d.URI == "":
		return errors.New("uri is empty")
	case d.Kind == VhostUserBlk && d.Socket == "":
		return errors.New("socket is empty")
	}
	return nil
}

// State is the contents of state.json.
type State struct {
	SchemaVersion int      `json:"schema_version"`
	Name          string   `json:"name"`
	Process       Process  `json:"process"`
	Phase         Phase    `json:"phase"`
	Target        Target   `json:"target"`
	Args          []string `json:"args"` // flags that make the same connection again
	Devices       []Device `json:"devices"`
	// Listen is the address of the devices' NBD server: the path of a unix socket, or
	// HOST:PORT. It is empty if there is no such server.
	Listen string `json:"listen,omitempty"`
	// Controllers are the controllers of the subsystem that may still
	// execute commands of this server or of earlier ones, oldest first.
	Controllers []Controller `json:"controllers"`
	// Earlier are those of Controllers that this server inherited. Each server that
	// starts waits for them, because this one may still be waiting.
	Earlier []Controller `json:"earlier_controllers,omitempty"`
	// Made is when the target made the last controller of each of these ids, and the newest
	// controller of the server, which may not have commands yet. Ids of which that is not
	// known are missing.
	Made map[Controller]Made `json:"made_at,omitempty"`
	// KeepAlive is the longest keep alive timeout of the controllers, in seconds.
	// It determines when the target notices that their server is gone. Zero means
	// unknown.
	KeepAlive int `json:"keep_alive_tmo,omitempty"`
}

// check returns an error that names the first field that is not valid.
func (s *State) check() error {
	if s.Process.PID <= 0 {
		return fmt.Errorf("process: pid %d is not positive", s.Process.PID)
	}
	if s.Target.NQN == "" {
		return errors.New("target: nqn is empty")
	}
	if s.KeepAlive < 0 {
		return fmt.Errorf("keep_alive_tmo %d is negative", s.KeepAlive)
	}
	for i, d := range s.Devices {
		if err := d.check(); err != nil {
			return fmt.Errorf("devices[%d]: %w", i, err)
		}
	}
	return nil
}

// locate adds the addresses to controllers of a record of an older version, which has them only
// in Made.
func (s *State) locate() {
	for c, m := range s.Made {
		if c.Address.IsValid() || !m.Address.IsValid() {
			continue
		}
		there := Controller{m.Address, c.CNTLID}
		delete(s.Made, c)
		s.Made[there] = m
		for _, all := range [][]Controller{s.Controllers, s.Earlier} {
			for i := range all {
				if all[i] == c {
					all[i] = there
				}
			}
		}
	}
}

// parse decodes a state. For a state of another version it returns an error together
// with the target and the process, as far as they are present.
func parse(text []byte) (State, error) {
	var head struct {
		SchemaVersion int     `json:"schema_version"`
		Process       Process `json:"process"`
		Target        Target  `json:"target"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return State{}, err
	}
	if head.SchemaVersion != SchemaVersion {
		return State{SchemaVersion: head.SchemaVersion, Process: head.Process, Target: head.Target},
			fmt.Errorf("schema version %d is not %d: another version of this program wrote it", head.SchemaVersion, SchemaVersion)
	}
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return State{}, err
	}
	s.locate()
	return s, s.check()
}

// Dir is a run directory.
type Dir string

// Record is the state of a server as List found it.
type Record struct {
	State
	Alive bool  // the server runs
	Err   error // state.json cannot be read; only Name is certain
	dir   string
}

// Socket returns the path of the server's control socket.
func (r Record) Socket() string { return filepath.Join(r.dir, socketFile) }

// Log returns the path of the server's log.
func (r Record) Log() string { return filepath.Join(r.dir, logFile) }

// List returns the records of all servers, in the order of their names.
func (d Dir) List() ([]Record, error) { return d.Others("") }

// Others returns the records of all servers but the named one, in the order of their names.
func (d Dir) Others(own string) ([]Record, error) {
	names, err := rundir.Numbered(string(d), namePrefix)
	if err != nil {
		return nil, fmt.Errorf("list servers: %w", err)
	}
	var records []Record
	for _, name := range names {
		if name == own {
			continue
		}
		r, err := d.Find(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // just made, or just removed
		}
		records = append(records, r)
	}
	return records, nil
}

// Find returns the record of a server. The error is fs.ErrNotExist, or the Err of the
// record.
func (d Dir) Find(name string) (Record, error) {
	r := Record{dir: filepath.Join(string(d), name)}
	file := filepath.Join(r.dir, stateFile)
	text, err := readFile(file)
	if err == nil {
		r.State, err = parse(text)
	}
	r.Name = name
	r.Alive = r.Process.Alive()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("read %s: %w", file, err)
	}
	r.Err = err
	return r, err
}

// readFile reads a regular file of at most maxStateSize bytes. It does not block on
// other kinds of files.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		return nil, p.Err // the caller names the file
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("it is not a regular file, but %v", info.Mode().Type())
	}
	text, err := io.ReadAll(io.LimitReader(f, maxStateSize+1))
	if err == nil && len(text) > maxStateSize {
		err = fmt.Errorf("it is longer than %d bytes", maxStateSize)
	}
	return text, err
}

// public is the mode of files that other users may read.
const public fs.FileMode = 0o644

// writeFile replaces the contents of a file atomically. If the process dies meanwhile,
// the file has either its old or its new contents.
func writeFile(path string, content any, mode fs.FileMode) error {
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return errors.Join(writeIn(dir, filepath.Base(path), content, mode), dir.Close())
}

// writeIn is like writeFile, for a file of a directory that is open.
func writeIn(dir *os.Root, name string, content any, mode fs.FileMode) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", filepath.Join(dir.Name(), name), err)
		}
	}()
	text, err := json.MarshalIndent(content, "", "\t")
	if err != nil {
		return err
	}
	next := name + ".new"
	if err := dir.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, bytes.NewReader(append(text, '\n')))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = dir.Rename(next, name)
	}
	if err != nil {
		_ = dir.Remove(next) // it is of no use any more
	}
	return err
}
