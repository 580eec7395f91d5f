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
	"syscall"

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

// take makes and locks the directory; EWOULDBLOCK if somebody has it. Nobody else
// may be able to put anything there: what the target writes would go where they
// want.
func (p *place) take() error {
	if err := os.MkdirAll(filepath.Dir(p.dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(p.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := os.OpenFile(p.dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	if err := p.lockOpen(f); err != nil {
		return errors.Join(err, f.Close())
	}
	p.lock = f
	return nil
}

// lockOpen checks and locks the open directory, and removes the socket of a dead
// process.
func (p *place) lockOpen(f *os.File) error {
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	above, err := os.Stat(filepath.Dir(p.dir))
	if err != nil {
		return err
	}
	if err := errors.Join(private(filepath.Dir(p.dir), above, above.Mode()&fs.ModeSticky != 0), private(p.dir, mine, false)); err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	there, err := os.Lstat(p.dir)
	if err != nil {
		return err
	}
	if !os.SameFile(mine, there) {
		return fs.ErrNotExist
	}
	if err := os.Remove(p.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// private is an error unless a directory is this user's or root's, and others
// cannot write to it. sticky says that they may, since they cannot remove what is
// not theirs.
func private(dir string, info fs.FileInfo, sticky bool) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return fmt.Errorf("%s: its owner is unknown", dir)
	case int(st.Uid) != os.Geteuid() && st.Uid != 0:
		return fmt.Errorf("%s belongs to user %d, who could change what a target writes there; want another --run-dir", dir, st.Uid)
	case info.Mode().Perm()&0o022 != 0 && !sticky:
		return fmt.Errorf("%s has mode %v: others could change what a target writes there; want another --run-dir, or mode 0755", dir, info.Mode())
	}
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
