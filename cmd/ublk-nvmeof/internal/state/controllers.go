package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// maxLeft is the number of controllers of a subsystem that are kept, the newest ones.
const maxLeft = 1024

// controllersFile is the file with the controllers of servers whose record is gone.
const controllersFile = ".controllers.json"

// left holds the controllers of servers whose record is gone, by subsystem.
type left []leftBy

type leftBy struct {
	NQN         string       `json:"nqn"`
	HostNQN     string       `json:"hostnqn"`
	Controllers []Controller `json:"controllers"`
	KeepAlive   int          `json:"keep_alive_tmo,omitempty"` // like State.KeepAlive
}

func (b leftBy) isOf(t Target) bool { return b.NQN == t.NQN && b.HostNQN == t.HostNQN }

// of returns the controllers of a subsystem.
func (l left) of(t Target) leftBy {
	i := slices.IndexFunc(l, func(b leftBy) bool { return b.isOf(t) })
	if i < 0 {
		return leftBy{NQN: t.NQN, HostNQN: t.HostNQN}
	}
	return l[i]
}

func (l left) without(t Target) left {
	return slices.DeleteFunc(slices.Clone(l), func(b leftBy) bool { return b.isOf(t) })
}

func (l left) with(t Target, more []Controller, keepAlive int) left {
	b := l.of(t)
	all := Distinct(append(slices.Clone(b.Controllers), more...))
	b.Controllers, b.KeepAlive = all[max(0, len(all)-maxLeft):], max(b.KeepAlive, keepAlive)
	return append(l.without(t), b)
}

type controllersState struct {
	SchemaVersion int  `json:"schema_version"`
	Left          left `json:"left"`
}

// leftControllers reads the file. The caller holds the lock.
func (d Dir) leftControllers() (left, error) {
	file := filepath.Join(string(d), controllersFile)
	text, err := readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var s controllersState
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err == nil && s.SchemaVersion != SchemaVersion {
		err = fmt.Errorf("schema version %d is not %d: another version of this program wrote it", s.SchemaVersion, SchemaVersion)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s, which lists controllers that may still execute commands: %w", file, err)
	}
	return s.Left, nil
}

// saveLeft replaces the file. The caller holds the lock.
func (d Dir) saveLeft(l left) error {
	file := filepath.Join(string(d), controllersFile)
	if len(l) > 0 {
		return writeFile(file, controllersState{SchemaVersion, l}, public)
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", file, err)
	}
	return nil
}
