package server

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// Users of a socket look for its server at an address, also after the server has died. So
// an address on record belongs to its server until the record ends.

// maxSocketPath is the longest path that fits into struct sockaddr_un.
const maxSocketPath = 107

// addressesOf returns the addresses at which users look for the recorded server: paths of
// unix sockets, and HOST:PORT.
func addressesOf(r state.State) []string {
	var all []string
	if at := listensAt(r); at != "" {
		all = append(all, at)
	}
	for _, d := range r.Devices {
		if d.Socket != "" {
			all = append(all, d.Socket)
		}
	}
	return all
}

// derivedPath returns a path in the run directory for a socket of this server. It is
// derived from the target, and no other subsystem ever has it. A second server of the same
// target gets another path.
func (s *server) derivedPath(prefix string) (string, error) {
	t := s.target()
	sum := sha256.Sum256([]byte(t.Address.String() + "\x00" + t.NQN + "\x00" + t.HostNQN))
	path := filepath.Join(string(s.cfg.Dir), prefix+"-"+hex.EncodeToString(sum[:8]))
	records, err := s.cfg.Dir.List()
	if err != nil {
		return "", err
	}
	own := s.record.state().Name
	for _, r := range records {
		if r.Name != own && slices.Contains(addressesOf(r.State), path+".sock") {
			return path + "-" + own + ".sock", nil
		}
	}
	return path + ".sock", nil
}

// claimPath makes sure that this server may listen at a path, and removes the socket of a
// dead server there. given is set if the user has chosen the path, with flag.
func (s *server) claimPath(path string, given bool, flag string) error {
	if len(path) > maxSocketPath {
		return exit.Errorf(exit.Other, "the path %s has %d bytes, and the path of a socket at most %d; want %s with a shorter path", path, len(path), maxSocketPath, flag)
	}
	if err := s.checkKept(path, given); err != nil {
		return err
	}
	return s.takeSocket(path, given)
}

// takeSocket removes the socket of a dead server. Either the record of this server must
// name it, or it must have the path in this run directory that only this target has.
// The owner of any other socket is unknown, and so is the target that its clients
// expect.
func (s *server) takeSocket(address string, given bool) error {
	own := func(at string) bool { return sameAddress(at, address) }
	if !given || slices.ContainsFunc(addressesOf(s.record.state()), own) {
		return removeDeadSocket(address)
	}
	info, err := os.Lstat(address)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case dialSocket(address) == nil:
		return errListens(address)
	case err == nil && info.Mode().Type() == os.ModeSocket:
		return exit.Errorf(exit.DeviceTaken, "%s is an existing socket that no record here names; clients may wait there for another target; remove it if no client does", address)
	case err == nil:
		return exit.Errorf(exit.DeviceTaken, "%s exists and is not a socket", address)
	default:
		return err
	}
}

// checkKept refuses an address where clients of a dead server may look for it.
func (s *server) checkKept(address string, given bool) error {
	records, err := s.cfg.Dir.List()
	if err != nil {
		return err
	}
	for _, r := range records {
		if r.Err != nil && given {
			return fmt.Errorf("the record of %s cannot be read, and its clients may look for it at %s: %w", r.Name, address, r.Err)
		}
	}
	kept, err := s.keptBy(func(r state.Record) bool {
		return slices.ContainsFunc(addressesOf(r.State), func(at string) bool { return sameAddress(at, address) })
	})
	if err != nil || len(kept) == 0 {
		return err
	}
	return errKept(address, kept[0])
}

// sameAddress reports whether a client of one address could reach a server at the other.
func sameAddress(a, b string) bool {
	if a == b || strings.HasPrefix(a, "/") && strings.HasPrefix(b, "/") && realPath(a) == realPath(b) {
		return true
	}
	x, xerr := netip.ParseAddrPort(a)
	y, yerr := netip.ParseAddrPort(b)
	if xerr != nil || yerr != nil || x.Port() != y.Port() {
		return false
	}
	return x.Addr().Unmap() == y.Addr().Unmap() || x.Addr().IsUnspecified() || y.Addr().IsUnspecified()
}

// realPath returns the path of a socket with the symbolic links of its directory
// resolved, if they can be.
func realPath(path string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return filepath.Clean(path)
	}
	return filepath.Join(dir, filepath.Base(path))
}

// dialSocket returns nil if a process accepts connections at the path of a socket,
// unix.ECONNREFUSED if a file is there but no process accepts connections, or another
// error.
func dialSocket(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}

// errListens returns the error for a socket at which another process listens.
func errListens(path string) error {
	return exit.Errorf(exit.DeviceTaken, "another process listens at %s", path)
}

// removeDeadSocket removes a socket that nobody listens on.
func removeDeadSocket(path string) error {
	err := dialSocket(path)
	switch {
	case err == nil:
		return errListens(path)
	case errors.Is(err, unix.ECONNREFUSED):
		if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSocket {
			return fmt.Errorf("%s exists and is not a socket", path)
		}
		return os.Remove(path)
	}
	return nil
}
