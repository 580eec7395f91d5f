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
)

const (
	namePrefix = "target"
	socketFile = "control.sock"
)

// place is the directory of a running target. The lock on it ends with the
// process, so one that can be locked is left over.
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
		for {
			err := p.take()
			if errors.Is(err, fs.ErrNotExist) {
				continue // its owner was just removing it
			}
			if err == nil {
				return p, nil
			}
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("make directory for a target: %w", err)
			}
			break
		}
	}
}

// take locks the directory; EWOULDBLOCK if somebody has it.
func (p *place) take() error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	f, err := os.Open(p.dir)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(err, f.Close())
	}
	mine, err := f.Stat()
	if err == nil {
		var there fs.FileInfo
		if there, err = os.Stat(p.dir); err == nil && !os.SameFile(mine, there) {
			err = fs.ErrNotExist
		}
	}
	if err == nil {
		if err = os.Remove(p.socket()); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	p.lock = f
	return nil
}

// leave gives the name back.
func (p *place) leave() error {
	return errors.Join(os.RemoveAll(p.dir), p.lock.Close())
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
