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

// place is the directory of a running target. The target holds a lock on a file
// in it, which only its user can open. The lock ends with the process, so a
// directory whose lock is free was left by a dead target.
type place struct {
	name, dir string
	lock      *os.File
}

func (p *place) socket() string { return filepath.Join(p.dir, socketFile) }

// takePlace takes the first free name.
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

// take makes and locks the directory. The error is EWOULDBLOCK if a running
// target has it.
func (p *place) take() error {
	for {
		err := p.tryTake()
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}

// tryTake is take, but fs.ErrNotExist if the place was removed meanwhile.
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

// leave gives the name back and removes the directory. The lock is removed after
// everything else. From then on another target may take the directory, which
// therefore is removed only if it is empty.
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

// empty removes everything in the directory but the lock.
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

// unlessGone is the error unless it says that a file does not exist.
func unlessGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// List finds the names of the targets that run, in order, and takes away what
// dead ones left.
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
			_ = p.leave() // the next one tries again
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

// Socket is the control socket of a target.
func Socket(runDir, name string) string { return filepath.Join(runDir, name, socketFile) }
