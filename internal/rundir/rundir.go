// Package rundir makes and opens the directories in which the program keeps its
// records, logs and sockets, and the files in them. On a machine with several users
// another user may have made a directory of the same name first, or left a symbolic
// link there. A directory is therefore used only if the calling user owns it and
// nobody else can write to it or replace it or one of its parents. A symbolic link
// is not followed in place of the directory or of a file in it.
//
// Paths must be absolute. All functions may be called from any goroutine.
package rundir

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const programName = "ublk-nvmeof"

// MaxSocketPath is the longest path of a socket, in bytes (sun_path of
// struct sockaddr_un without the terminating NUL).
const MaxSocketPath = 107

// maxLinks is how many symbolic links may be on the way to a directory, as in
// path_resolution(7).
const maxLinks = 40

// maxKept bounds what Keep reads, in bytes.
const maxKept = 64 << 10

// UnsafeError is a directory or file that somebody else could have prepared, or that is
// in such a directory.
type UnsafeError struct {
	Path   string
	Reason string
	Remedy string // a command that makes Path safe; empty if there is none
}

func (e *UnsafeError) Error() string {
	text := e.Path + ": " + e.Reason
	if e.Remedy != "" {
		text += "; " + e.Remedy + " prevents that"
	}
	return text
}

// System is the directory of root for what does not outlive a boot.
const System = "/run/" + programName

// Default is the directory for what does not outlive a boot: System of root, a
// directory below $XDG_RUNTIME_DIR of another user, or one below the directory
// for temporary files if that variable is not set.
func Default() string {
	uid := os.Geteuid()
	if uid == 0 {
		return System
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, programName)
	}
	return filepath.Join(os.TempDir(), programName+"-"+strconv.Itoa(uid))
}

// Shared returns the directories in which what does not outlive a boot is found by all
// processes of a host that may trust each other, whatever their environment is. The first
// is Default; the others are only read. Root has System alone. Another user also has
// System, and the directories that Default returns for this user in a session with and
// without $XDG_RUNTIME_DIR.
func Shared() []string {
	dirs := []string{Default()}
	uid := strconv.Itoa(os.Geteuid())
	for _, dir := range []string{System, filepath.Join("/run/user", uid, programName), filepath.Join("/tmp", programName+"-"+uid)} {
		if uid != "0" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// Persistent is the directory for what outlives a boot: $STATE_DIRECTORY of a
// service (systemd.exec(5)), else /var/lib/ublk-nvmeof of root, and a directory
// below $XDG_STATE_HOME or ~/.local/state of another user. It is an error if the
// user has no home directory.
func Persistent() (string, error) {
	if dir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":"); filepath.IsAbs(dir) {
		return dir, nil
	}
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib", programName), nil
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, programName), nil
	}
	home, err := os.UserHomeDir()
	if err == nil && !filepath.IsAbs(home) {
		err = fmt.Errorf("$HOME %q is not absolute", home)
	}
	return filepath.Join(home, ".local/state", programName), err
}

// Make makes a directory with the permissions perm, and its missing parents,
// unless it is there. The caller may use it if the error is nil: the caller's
// user owns it, nobody else can write to it, and nobody but root can put another
// one in its place. The error is an *UnsafeError if that is not so.
func Make(path string, perm fs.FileMode) error {
	fd, err := walk(path, &perm, ours)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// Check is Make for a directory that is only read. It may be root's, and it is
// no error if it does not exist.
func Check(path string) error {
	fd, err := walk(path, nil, trusted)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// OpenFile opens, or with os.O_CREATE makes, a regular file of the calling user.
// Its directory must pass the same check as in Make.
func OpenFile(path string, flag int, perm fs.FileMode) (*os.File, error) {
	dir, err := walk(filepath.Dir(path), nil, ours)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	return openAt(dir, path, flag, perm)
}

// openAt opens the file that path names in the directory dir.
func openAt(dir int, path string, flag int, perm fs.FileMode) (*os.File, error) {
	fd, err := unix.Openat(dir, filepath.Base(path), flag|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, uint32(perm.Perm()))
	if errors.Is(err, unix.ELOOP) {
		return nil, &UnsafeError{Path: path, Reason: "it is a symbolic link; want a regular file"}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
		err = &fs.PathError{Op: "stat", Path: path, Err: err}
		return nil, errors.Join(err, unix.Close(fd))
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.Join(&UnsafeError{Path: path, Reason: "it is no regular file"}, unix.Close(fd))
	case !ours(st.Uid):
		return nil, errors.Join(&UnsafeError{Path: path, Reason: foreign(st.Uid)}, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Keep stores text, up to 64 KiB, in a file unless the file exists, and returns
// what the file holds. It is all there or not at all, and callers at the same time, in any
// process, get the same. The directory must pass the same check as in Make.
func Keep(path string, text []byte, perm fs.FileMode) ([]byte, error) {
	dir, err := walk(filepath.Dir(path), nil, ours)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	kept, err := readAt(dir, path)
	if !errors.Is(err, fs.ErrNotExist) {
		return kept, err
	}
	// A link, unlike a rename, does not replace what another process has kept.
	draft := path + "." + rand.Text()
	if err := writeAt(dir, draft, text, perm); err != nil {
		return nil, err
	}
	err = unix.Linkat(dir, filepath.Base(draft), dir, filepath.Base(path), 0)
	if uerr := unix.Unlinkat(dir, filepath.Base(draft), 0); uerr != nil {
		err = errors.Join(err, &fs.PathError{Op: "remove", Path: draft, Err: uerr})
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &fs.PathError{Op: "link", Path: path, Err: err}
	}
	return readAt(dir, path)
}

func readAt(dir int, path string) ([]byte, error) {
	f, err := openAt(dir, path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxKept))
}

// writeAt makes a file that does not exist yet.
func writeAt(dir int, path string, text []byte, perm fs.FileMode) error {
	f, err := openAt(dir, path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// CheckSocket reports whether path is short enough for a socket.
func CheckSocket(path string) error {
	if len(path) > MaxSocketPath {
		return fmt.Errorf("%q has %d bytes; the path of a socket has at most %d", path, len(path), MaxSocketPath)
	}
	return nil
}

// Listen makes a socket to which only the calling user and root can connect. Its
// directory must pass the same check as in Make.
func Listen(path string) (net.Listener, error) {
	if err := CheckSocket(path); err != nil {
		return nil, err
	}
	dir, err := walk(filepath.Dir(path), nil, ours)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	// The permissions of an unbound socket become those of its file (unix_bind_bsd
	// in net/unix/af_unix.c), so the file never has others.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	return config.Listen(context.Background(), "unix", path)
}

// ours reports whether the calling user owns a file whose owner is uid.
func ours(uid uint32) bool { return int(uid) == os.Geteuid() }

// trusted reports whether what the owner uid has made is as good as ours. In a user
// namespace root may have no number, so the owner of / counts, too.
func trusted(uid uint32) bool {
	if uid == 0 || ours(uid) {
		return true
	}
	info, err := os.Lstat("/")
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Uid == uid
}

func foreign(uid uint32) string {
	return fmt.Sprintf("it belongs to user %d, not to user %d", uid, os.Geteuid())
}

// walk opens a directory step by step from the root, and checks each step. It
// makes what is missing if perm is not nil. The owner of the last directory has
// to satisfy last.
func walk(path string, perm *fs.FileMode, last func(uid uint32) bool) (int, error) {
	if !filepath.IsAbs(path) {
		return -1, fmt.Errorf("%q: want an absolute path", path)
	}
	w := walker{fd: -1, perm: perm}
	if err := w.root(); err != nil {
		return -1, err
	}
	rest := steps(path)
	for links := 0; len(rest) > 0; {
		link, err := w.step(rest[0], len(rest) == 1)
		switch {
		case err != nil:
			return -1, errors.Join(err, unix.Close(w.fd))
		case link == "":
			rest = rest[1:]
			continue
		case links == maxLinks:
			return -1, errors.Join(&fs.PathError{Op: "open", Path: path, Err: unix.ELOOP}, unix.Close(w.fd))
		}
		links++
		rest = append(steps(link), rest[1:]...)
		if filepath.IsAbs(link) {
			if err := w.root(); err != nil {
				return -1, err
			}
		}
	}
	if err := w.check(last); err != nil {
		return -1, errors.Join(err, unix.Close(w.fd))
	}
	return w.fd, nil
}

func steps(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == filepath.Separator })
}

// walker is on the way to a directory.
type walker struct {
	fd   int    // the directory that was reached
	path string // of fd, without symbolic links
	perm *fs.FileMode
	st   unix.Stat_t // of fd
}

// root goes to /.
func (w *walker) root() error {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	return w.enter(fd, "/")
}

// enter makes fd the directory that was reached.
func (w *walker) enter(fd int, path string) error {
	old := w.fd
	w.fd, w.path = fd, path
	if old >= 0 {
		unix.Close(old)
	}
	if err := unix.Fstat(fd, &w.st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return nil
}

// step goes to the entry name of the directory, or returns where it leads to if
// it is a symbolic link, which the last one must not be.
func (w *walker) step(name string, last bool) (link string, err error) {
	if err := w.passable(); err != nil {
		return "", err
	}
	path := filepath.Join(w.path, name)
	var st unix.Stat_t
	err = unix.Fstatat(w.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) && w.perm != nil {
		perm := fs.FileMode(0o755)
		if last {
			perm = w.perm.Perm()
		}
		if err := unix.Mkdirat(w.fd, name, uint32(perm)); err != nil && !errors.Is(err, unix.EEXIST) {
			return "", &fs.PathError{Op: "mkdir", Path: path, Err: err}
		}
		err = unix.Fstatat(w.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		switch {
		case last:
			return "", &UnsafeError{Path: path, Reason: "it is a symbolic link; want a directory"}
		case !trusted(st.Uid):
			return "", &UnsafeError{Path: path, Reason: "it is a symbolic link of user " + strconv.FormatUint(uint64(st.Uid), 10)}
		}
		return readLink(w.fd, name)
	}
	fd, err := unix.Openat(w.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return "", w.enter(fd, path)
}

func readLink(dir int, name string) (string, error) {
	text := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, text)
	if err == nil && n == 0 {
		err = unix.ENOENT
	}
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(text[:n]), nil
}

// passable reports whether only root and we can change what is in the directory,
// or only their own entries of it (as in /tmp).
func (w *walker) passable() error {
	mode := w.st.Mode & 0o7777
	switch {
	case !trusted(w.st.Uid):
		return &UnsafeError{Path: w.path, Reason: foreign(w.st.Uid)}
	case w.st.Mode&unix.S_ISVTX != 0:
	case w.st.Mode&0o002 != 0:
		return &UnsafeError{w.path, fmt.Sprintf("everybody can write to it and replace what is in it (mode %04o)", mode), "chmod o-w " + w.path}
	case w.st.Mode&0o020 != 0 && w.st.Gid != w.st.Uid: // a group with the owner's number is the owner's own
		return &UnsafeError{w.path, fmt.Sprintf("group %d can write to it and replace what is in it (mode %04o)", w.st.Gid, mode), "chmod g-w " + w.path}
	}
	return nil
}

// check reports whether the directory itself may be used.
func (w *walker) check(owner func(uid uint32) bool) error {
	switch {
	case !owner(w.st.Uid):
		return &UnsafeError{Path: w.path, Reason: foreign(w.st.Uid)}
	case w.st.Mode&0o022 != 0:
		return &UnsafeError{w.path, fmt.Sprintf("others can write to it (mode %04o)", w.st.Mode&0o7777), "chmod go-w " + w.path}
	}
	return nil
}
