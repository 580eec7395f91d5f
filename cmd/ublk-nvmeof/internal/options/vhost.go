package options

import (
	"fmt"
	"io/fs"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"ublk-nvmeof/internal/rundir"
)

// NSIDField stands for the number of a namespace in the path of its socket.
const NSIDField = "{nsid}"

// FileOwner is the owner of a file. A negative number means that of the process.
type FileOwner struct {
	UID, GID int
	text     string // as given
}

// anyOwner is the value of a flag that is not given.
var anyOwner = FileOwner{UID: -1, GID: -1}

const defaultVhostMode fs.FileMode = 0o600

// addVhost defines the flags for the sockets of virtual machine monitors.
func (c *Connect) addVhost(f *pflag.FlagSet) {
	f.Var(fileMode(&c.VhostMode), "vhost-socket-mode", "permissions of the sockets for virtual machine monitors; who can write to one reads and writes the namespace")
	f.Var(fileOwner(&c.VhostOwner), "vhost-socket-owner", "owner of the sockets for virtual machine monitors (default: the user of the server)")
	f.BoolVar(&c.ZeroCopy, "zero-copy", false, "do not copy the data of guests where their memory is contiguous, or in as many pieces as the target takes. The target can then read and write all of the guests' memory, not only I/O buffers")
}

// completeVhost checks the flags for the sockets of virtual machine monitors and of shared memory
// in combination.
func (c *Connect) completeVhost() error {
	switch {
	case c.ShmemSocket != "" && c.Frontend != Ublk:
		return fmt.Errorf("--shmem-socket %q: want it with --frontend %s, not %s", c.ShmemSocket, Ublk, c.Frontend)
	case c.ShmemSocket != "" && !strings.Contains(c.ShmemSocket, NSIDField) && len(c.NSIDs) != 1:
		return fmt.Errorf("--shmem-socket %q: each namespace has a socket; want a path with %s in it, or --namespace with one id", c.ShmemSocket, NSIDField)
	}
	given := ""
	switch {
	case c.VhostSocket != "":
		given = fmt.Sprintf("--vhost-socket %q", c.VhostSocket)
	case c.VhostMode != defaultVhostMode:
		given = fmt.Sprintf("--vhost-socket-mode \"%04o\"", c.VhostMode)
	case c.VhostOwner != anyOwner:
		given = fmt.Sprintf("--vhost-socket-owner %q", c.VhostOwner.text)
	case c.ZeroCopy:
		given = "--zero-copy"
	}
	switch {
	case given != "" && c.Frontend != VhostUserBlk:
		return fmt.Errorf("%s: want it with --frontend %s, not %s", given, VhostUserBlk, c.Frontend)
	case c.VhostSocket != "" && !strings.Contains(c.VhostSocket, NSIDField) && len(c.NSIDs) != 1:
		return fmt.Errorf("--vhost-socket %q: each namespace has a socket; want a path with %s in it, or --namespace with one id", c.VhostSocket, NSIDField)
	}
	return nil
}

// checkVhostSocket accepts the path of a socket, with room for the longest number of a
// namespace.
func checkVhostSocket(s string) error {
	longest := strings.ReplaceAll(s, NSIDField, strconv.Itoa(maxNSID))
	if !filepath.IsAbs(s) || rundir.CheckSocket(longest) != nil || strings.Contains(filepath.Dir(s), NSIDField) {
		return errUnwanted
	}
	return nil
}

func fileMode(dst *fs.FileMode) *flagValue[fs.FileMode] {
	return &flagValue[fs.FileMode]{
		dst: dst,
		parse: func(s string) (fs.FileMode, error) {
			n, err := strconv.ParseUint(s, 8, 16)
			if err != nil || n > 0o777 || n&0o600 != 0o600 {
				return 0, errUnwanted
			}
			return fs.FileMode(n), nil
		},
		format: func(m fs.FileMode) string { return fmt.Sprintf("%04o", m) },
		kind:   "mode", want: "an octal number up to 0777 that lets the owner read and write, like 0660",
	}
}

func fileOwner(dst *FileOwner) *flagValue[FileOwner] {
	return &flagValue[FileOwner]{
		dst: dst, parse: parseOwner, format: func(o FileOwner) string { return o.text },
		kind: "owner", want: "USER, USER:GROUP or :GROUP, names or numbers of this system",
	}
}

func parseOwner(s string) (FileOwner, error) {
	o := anyOwner
	o.text = s
	name, group, ok := strings.Cut(s, ":")
	if s == "" || ok && group == "" {
		return o, errUnwanted
	}
	if name != "" {
		n, err := idOf(name, func(s string) (string, error) {
			u, err := user.Lookup(s)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
		if err != nil {
			return o, fmt.Errorf("there is no user %q", name)
		}
		o.UID = n
	}
	if group != "" {
		n, err := idOf(group, func(s string) (string, error) {
			g, err := user.LookupGroup(s)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
		if err != nil {
			return o, fmt.Errorf("there is no group %q", group)
		}
		o.GID = n
	}
	return o, nil
}

// idOf returns the number of a user or group, which is given by name or number.
func idOf(s string, lookup func(string) (string, error)) (int, error) {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return int(n), nil
	}
	id, err := lookup(s)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(id)
}
