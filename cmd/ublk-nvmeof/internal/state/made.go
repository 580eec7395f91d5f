package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/rundir"
)

// Made says when a target made a controller: at some time between Asked and Answered. Both
// are nanoseconds of CLOCK_MONOTONIC, which all processes of a boot share.
type Made struct {
	Address  netip.AddrPort `json:"address"` // of the target
	Network  string         `json:"network"` // the network namespace in which the target has Address
	Clock    string         `json:"clock"`   // the boot and the time namespace; empty: the times are unknown
	Asked    int64          `json:"asked"`
	Answered int64          `json:"answered"`
}

// JustMade describes a controller that the target at address has just made. asked is
// the time of the request for it, and must have a monotonic clock reading.
func JustMade(address netip.AddrPort, asked time.Time) Made {
	name, err := clock()
	network, nerr := os.Readlink("/proc/self/ns/net")
	var now unix.Timespec
	if errors.Join(err, nerr, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)) != nil {
		return Made{Address: address} // Before is false
	}
	return Made{Address: address, Network: network, Clock: name, Asked: now.Nano() - int64(time.Since(asked)), Answered: now.Nano()}
}

// Before reports whether a controller was certainly made before another one.
func (m Made) Before(o Made) bool {
	return m.Clock != "" && m.Clock == o.Clock && m.Answered < o.Asked
}

// clock names the clock of this process.
var clock = sync.OnceValues(func() (string, error) {
	b, err := boot()
	if err != nil {
		return "", err
	}
	namespace, err := os.Readlink("/proc/self/ns/time")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // the kernel may be built without time namespaces
		return "", err
	}
	return b + " " + namespace, nil
})

// lastMade returns when the last of the recorded controllers with each name was made. A name is
// missing if the order of its controllers is not certain.
func lastMade(records []Record) map[Controller]Made {
	last := map[Controller]Made{}
	uncertain := map[Controller]bool{}
	for _, r := range records {
		for _, c := range r.Controllers {
			m, known := r.Made[c]
			have, several := last[c]
			switch {
			case !known:
				uncertain[c] = true
			case !several || have.Before(m):
				last[c] = m
			case m != have && !m.Before(have):
				uncertain[c] = true
			}
		}
	}
	for c := range uncertain {
		delete(last, c)
	}
	if len(last) == 0 {
		return nil // like a record without times
	}
	return last
}

// The directory for notices in each directory of a Host, and the extension of a notice.
const (
	madeDir   = ".made"
	noticeExt = ".json"
)

// Host lists the directories in which servers of this host tell each other which
// controllers targets have made for them. They are the directories of rundir.Shared and
// do not depend on the run directory. The notice of the calling process is in the first
// one. A Host without directories has no notices.
//
// A wrong notice can make a server overwrite newer data with an old write. So a notice
// counts only if it is in a directory of root or of the calling user that nobody else
// can change (rundir.Check). A user trusts root, but root trusts nobody else.
type Host []string

// notice is the contents of a file in a madeDir.
type notice struct {
	SchemaVersion int                 `json:"schema_version"`
	Process       Process             `json:"process"`
	NQN           string              `json:"nqn"` // of the subsystem
	Made          map[Controller]Made `json:"made"`
}

// Notify publishes the controllers of a subsystem that were made for the calling
// process. It replaces the earlier notice of the process, and removes the notices of
// processes that have ended.
func (h Host) Notify(nqn string, made map[Controller]Made) error {
	if len(h) == 0 {
		return nil
	}
	self, err := Of(os.Getpid())
	if err != nil {
		return err
	}
	dir := filepath.Join(h[0], madeDir)
	if err := rundir.Make(dir, 0o755); err != nil {
		return fmt.Errorf("make directory for controller ids: %w", err)
	}
	for path, n := range notices(dir) {
		if !n.Process.Alive() {
			_ = os.Remove(path) // the next process tries again
		}
	}
	return writeFile(noticeFile(dir, self), notice{SchemaVersion, self, nqn, made}, public)
}

// Withdraw removes the notice of the calling process, if there is one.
func (h Host) Withdraw() error {
	if len(h) == 0 {
		return nil
	}
	self, err := Of(os.Getpid())
	if err == nil {
		err = os.Remove(noticeFile(filepath.Join(h[0], madeDir), self))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("withdraw controller ids: %w", err)
	}
	return nil
}

// GivenLater reports whether the target has certainly given the id of a controller of the
// subsystem to another server later. made is when the controller was made. A target in
// another network namespace may have the same address and does not count.
func (h Host) GivenLater(nqn string, c Controller, made Made) bool {
	for _, parent := range h {
		dir := filepath.Join(parent, madeDir)
		if rundir.Check(dir) != nil {
			continue
		}
		for _, n := range notices(dir) {
			if m, ok := n.Made[c]; ok && n.NQN == nqn && m.Network == made.Network && made.Before(m) {
				return true
			}
		}
	}
	return false
}

// notices returns the notices in dir, by path. It leaves out files that it cannot read,
// which may be of another version.
func notices(dir string) map[string]notice {
	found := map[string]notice{}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if filepath.Ext(e.Name()) != noticeExt {
			continue // it is being written
		}
		path := filepath.Join(dir, e.Name())
		var n notice
		text, err := readFile(path)
		if err == nil && json.Unmarshal(text, &n) == nil && n.SchemaVersion == SchemaVersion {
			found[path] = n
		}
	}
	return found
}

func noticeFile(dir string, p Process) string {
	return filepath.Join(dir, fmt.Sprintf("%d-%d%s", p.PID, p.Start, noticeExt))
}
