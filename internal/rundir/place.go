package rundir

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
)

// lockFile is in each place.
const lockFile = "lock"

// Place is the directory of a running process, below the run directory. The process holds
// a lock on a file in it, which only its user can open. The lock ends with the process, so a
// directory whose lock is free was left by a dead one.
type Place struct {
	Name, Dir string
	lock      *os.File
}

// TakePlace takes the first free name of a prefix and a number. The directory is empty.
func TakePlace(runDir, prefix string) (*Place, error) {
	for n := 0; ; n++ {
		p := &Place{Name: prefix + strconv.Itoa(n)}
		p.Dir = filepath.Join(runDir, p.Name)
		switch err := p.take(); {
		case err == nil:
			return p, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("make directory %s: %w", p.Name, err)
		}
	}
}

// take makes and locks the directory. The error is EWOULDBLOCK if a running
// process has it.
func (p *Place) take() error {
	for {
		err := p.tryTake()
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}

// tryTake is take, but fs.ErrNotExist if the place was removed meanwhile.
func (p *Place) tryTake() error {
	if err := Make(p.Dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(p.Dir, lockFile)
	f, err := OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
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
		err = p.empty()
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	p.lock = f
	return nil
}

// Leave gives the name back and removes the directory. The lock is removed after
// everything else. From then on another process may take the directory, which
// therefore is removed only if it is empty.
func (p *Place) Leave() error {
	err := p.empty()
	if err == nil {
		err = unlessGone(os.Remove(filepath.Join(p.Dir, lockFile)))
	}
	if err == nil {
		if err = unlessGone(os.Remove(p.Dir)); errors.Is(err, unix.ENOTEMPTY) {
			err = nil
		}
	}
	return errors.Join(err, p.lock.Close())
}

// empty removes everything in the directory but the lock.
func (p *Place) empty() error {
	entries, err := os.ReadDir(p.Dir)
	if err = unlessGone(err); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != lockFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(p.Dir, e.Name())))
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

// Places finds the names of a prefix whose processes run, in order, and takes away what dead
// ones left.
func Places(runDir, prefix string) ([]string, error) {
	all, err := Numbered(runDir, prefix)
	if err != nil {
		return nil, fmt.Errorf("list run directory: %w", err)
	}
	var names []string
	for _, name := range all {
		p := &Place{Name: name, Dir: filepath.Join(runDir, name)}
		switch err := p.take(); {
		case err == nil:
			_ = p.Leave() // the next one tries again
		case errors.Is(err, unix.EWOULDBLOCK):
			names = append(names, name)
		}
	}
	return names, nil
}

// Numbered returns the names of the directories in the run directory that are a prefix and a
// number, in the order of the numbers. There are none if the run directory does not exist.
func Numbered(runDir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(runDir)
	if err = unlessGone(err); err != nil {
		return nil, err
	}
	number := func(name string) int {
		digits, ok := strings.CutPrefix(name, prefix)
		if n, err := strconv.Atoi(digits); ok && err == nil {
			return n
		}
		return -1
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && number(e.Name()) >= 0 {
			names = append(names, e.Name())
		}
	}
	slices.SortFunc(names, func(a, b string) int { return number(a) - number(b) })
	return names, nil
}
