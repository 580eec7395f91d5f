package state

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/internal/rundir"
)

const (
	// lockFile is a separate file that only its owner can open, because everybody
	// who can open a file can lock it.
	lockFile = ".lock"
	// lockTime is the longest wait for the lock. Every holder needs it for less
	// time.
	lockTime  = 10 * time.Second
	lockRetry = 5 * time.Millisecond
)

// lock locks the set of records, and waits at most lockTime for the lock, which ends with
// the process. The error is fs.ErrNotExist if there is no run directory. Otherwise it names
// the process that holds the lock, and wraps ctx' error or context.DeadlineExceeded.
func (d Dir) lock(ctx context.Context) (unlock func(), err error) {
	file, err := d.openLock()
	if err != nil {
		return nil, fmt.Errorf("lock run directory %s: %w", d, err)
	}
	fd := int(file.Fd())
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { file.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			file.Close()
			return nil, fmt.Errorf("lock run directory %s: %w", d, err)
		}
		select {
		case <-time.After(lockRetry):
		case <-limited.Done():
			holder := lockHolder(fd)
			file.Close()
			return nil, fmt.Errorf("lock run directory %s: %s has it locked, waited %v: %w",
				d, holder, time.Since(began).Round(time.Millisecond), context.Cause(limited))
		}
	}
}

// LockHolder describes the process that has locked the set of records. It returns an empty
// string if no process has, or if that cannot be found out.
func (d Dir) LockHolder() string {
	file, err := d.openLock()
	if err != nil {
		return ""
	}
	defer file.Close()
	if !errors.Is(unix.Flock(int(file.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return ""
	}
	return lockHolder(int(file.Fd()))
}

// openLock opens the lock file. Its directory is one in which nobody else can replace
// it.
func (d Dir) openLock() (*os.File, error) {
	f, err := rundir.OpenFile(filepath.Join(string(d), lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("others can open %s, and therefore lock it (mode %04o); want 0600", f.Name(), info.Mode().Perm())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockHolder describes the process that has locked a file.
func lockHolder(fd int) string {
	var st unix.Stat_t
	text, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(fd, &st) != nil {
		return "another process"
	}
	pid := findHolder(text, st.Ino)
	if pid <= 0 {
		return "another process"
	}
	return fmt.Sprintf("process %d (%s)", pid, host.Command(pid))
}

// findHolder returns the number of the process that holds a flock on a file, or 0.
// locks has the format of proc_locks(5). The device is not compared, because some file
// systems (btrfs) show another device there than in fstat.
func findHolder(locks []byte, ino uint64) int {
	lines := bufio.NewScanner(bytes.NewReader(locks))
	for lines.Scan() {
		f := strings.Fields(lines.Text()) // 1: FLOCK ADVISORY WRITE PID MAJ:MIN:INODE 0 EOF
		if len(f) < 6 || f[1] != "FLOCK" {
			continue
		}
		if strings.HasSuffix(f[5], ":"+strconv.FormatUint(ino, 10)) {
			pid, _ := strconv.Atoi(f[4])
			return pid
		}
	}
	return 0
}
