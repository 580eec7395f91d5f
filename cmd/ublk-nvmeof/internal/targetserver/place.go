package targetserver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/rundir"
)

const (
	namePrefix = "target"
	socketFile = "control.sock"
	lockFile   = "lock"
)

// place is the directory of a running target. The target holds a lock on a file in it
// that only its user can open. The lock ends with the process, so a directory with a
// free lock was left by a dead target.
type place struct {
	name, dir string
	lock      *os.File
}

func (p *place) socket() string { return filepath.Join(p.dir, socketFile) }

// takePlace takes the place with the first free name.
func takePlace(runDir string) (*place, error) {
	for n := 0; ; n++ {
		p := &place{name: namePrefix + strconv.Itoa(n)}
		p.dir = filepath.Join(runDir, p.name)
		switch err := p.take(); {
		case err == nil:
			return p, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("make directory for a target: %w", err)
		}
	}
}

// take makes and locks the directory. The error is EWOULDBLOCK if a running target has
// locked it.
func (p *place) take() error {
	for {
		err := p.tryTake()
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}

// tryTake is like take, but returns fs.ErrNotExist if the directory was removed
// meanwhile.
func (p *place) tryTake() error {
	if err := rundir.Make(p.dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(p.dir, lockFile)
	f, err := rundir.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(err, f.Close())
	}
	locked, err := f.Stat()
	if err == nil {
		var there fs.FileInfo
		if there, err = os.Lstat(path); err == nil && !os.SameFile(locked, there) {
			err = fs.ErrNotExist
		}
	}
	if err == nil {
		err = unlessGone(os.Remove(p.socket()))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	p.lock = f
	return nil
}

// leave removes the directory and releases the lock. It removes the lock file last.
// From then on another target may take the directory, so leave removes the directory
// only if it is empty.
func (p *place) leave() error {
	err := p.empty()
	if err == nil {
		err = unlessGone(os.Remove(filepath.Join(p.dir, lockFile)))
	}
	if err == nil {
		if err = unlessGone(os.Remove(p.dir)); errors.Is(err, unix.ENOTEMPTY) {
			err = nil
		}
	}
	return errors.Join(err, p.lock.Close())
}

// empty removes everything in the directory except the lock file.
func (p *place) empty() error {
	entries, err := os.ReadDir(p.dir)
	if err = unlessGone(err); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != lockFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(p.dir, e.Name())))
		}
	}
	return err
}

// unlessGone returns err, or nil if err says that a file does not exist.
func unlessGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// List returns the names of the running targets in the order of their numbers. It
// removes the directories of dead targets.
func List(runDir string) ([]string, error) {
	entries, err := os.ReadDir(runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list targets: %w", err)
	}
	var found []int
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), namePrefix)
		n, err := strconv.Atoi(digits)
		if !ok || err != nil || !e.IsDir() {
			continue
		}
		p := &place{name: e.Name(), dir: filepath.Join(runDir, e.Name())}
		switch err := p.take(); {
		case err == nil:
			_ = p.leave() // the next List tries again
		case errors.Is(err, unix.EWOULDBLOCK):
			found = append(found, n)
		}
	}
	slices.Sort(found)
	var names []string
	for _, n := range found {
		names = append(names, namePrefix+strconv.Itoa(n))
	}
	return names, nil
}

// Socket returns the path of the control socket of a target.
func Socket(runDir, name string) string { return filepath.Join(runDir, name, socketFile) }
