package ublk

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// State is the state of a device.
type State uint16

// States, UBLK_S_DEV_*.
const (
	Dead     State = iota // there is no disk: not started yet, stopped, or the server died
	Live                  // a server serves the disk
	Quiesced              // there is no server, and I/O waits for the next one
	FailIO                // there is no server, and I/O fails
)

var stateNames = [...]string{"dead", "live", "quiesced", "fail-io"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint16(s))
}

// Info is the driver's description of a device.
type Info struct {
	ID       int
	State    State
	Queues   int
	Depth    int    // tags per queue
	MaxIO    int    // bytes
	PID      int    // of the server; ≤ 0 if there is none
	UID, GID uint32 // of the process that added the device
	Features Features
	// Cookie is a number that the server chose when it added the device. See Ours.
	Cookie uint64
}

// Path returns the path of the block device.
func (i Info) Path() string { return blockPath(i.ID) }

// Ours reports whether this package added the device, in this or in another process. The
// upper half of the Cookie of such a device is a constant. The lower half is random and
// tells the device from another one that got its number later.
func (i Info) Ours() bool { return i.Cookie>>32 == cookieMagic }

const cookieMagic = 0x4e564d65 // "NVMe"

func newCookie() uint64 { return cookieMagic<<32 | uint64(rand.Uint32()) }

func blockPath(id int) string { return "/dev/ublkb" + strconv.Itoa(id) }
func charPath(id int) string  { return "/dev/ublkc" + strconv.Itoa(id) }

func infoOf(d *devInfo) Info {
	return Info{
		ID: int(d.devID), State: State(d.state), Queues: int(d.nrHWQueues), Depth: int(d.queueDepth),
		MaxIO: int(d.maxIOBufBytes), PID: int(d.pid), UID: d.ownerUID, GID: d.ownerGID,
		Features: Features(d.flags), Cookie: d.serverFlags,
	}
}

// Available returns nil if this process can use the driver, and otherwise the reason:
// ErrNoDriver, ErrPermission, or another error.
func Available() error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return c.close()
}

// GetFeatures returns the features of the driver. The error is ErrNoDriver if the driver
// has no such command (before Linux 6.5).
func GetFeatures(ctx context.Context) (Features, error) {
	c, err := openControl()
	if err != nil {
		return 0, err
	}
	f, err := c.features(ctx)
	return f, errors.Join(err, c.close())
}

// Get returns the driver's description of device id. The error is ErrNoDevice if it does
// not exist.
func Get(ctx context.Context, id int) (Info, error) {
	c, err := openControl()
	if err != nil {
		return Info{}, err
	}
	i, err := c.info(ctx, id)
	return i, errors.Join(err, c.close())
}

// List returns the driver's descriptions of all ublk devices of this host, in the order
// of their numbers, including those of other programs.
func List(ctx context.Context) ([]Info, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	l, err := c.list(ctx)
	return l, errors.Join(err, c.close())
}

// Remove deletes a device that this package added and whose server died. info is what
// List or Get returned. The error is ErrNotOurs if another program added the device or if
// the number belongs to another device by now, ErrBusy if the device has a server or waits
// for one, and ErrNoDevice if it does not exist. After an error the device is unchanged.
//
// Remove cannot see a server that has added its device but not opened it yet. Do not call
// Remove while a server starts.
func Remove(ctx context.Context, info Info) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return errors.Join(c.remove(ctx, info), c.close())
}

func (c *control) remove(ctx context.Context, info Info) error {
	now, err := c.info(ctx, info.ID)
	switch {
	case err != nil:
		return err
	case !now.Ours() || now.Cookie != info.Cookie:
		return fmt.Errorf("remove ublk device %d: %w", info.ID, ErrNotOurs)
	case now.State != Dead:
		return fmt.Errorf("remove ublk device %d: %w: it is %v", info.ID, ErrBusy, now.State)
	}
	// Only the server can have ublkcN open.
	fd, err := unix.Open(charPath(info.ID), unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("remove ublk device %d: %w: it has a server", info.ID, ErrBusy)
	case err == nil:
		_ = unix.Close(fd)
	}
	if _, err := c.delete(ctx, info.ID); err != nil {
		return fmt.Errorf("remove ublk device %d: %w", info.ID, err)
	}
	return nil
}

// deletePatience is how long DEL_DEV may wait for users of the block device.
const deletePatience = time.Second

// delete removes a device. DEL_DEV removes the device and then waits until its number is
// free, which is when the server's files and all openers of the disk are gone. delete ends
// that wait after deletePatience. The driver frees the number when the last opener is gone.
// free reports whether the number is free already.
func (c *control) delete(ctx context.Context, id int) (free bool, err error) {
	for patience := deletePatience; ; patience *= 2 {
		bound, cancel := context.WithTimeout(ctx, patience)
		err := c.do(bound, call{cmd: delDev, id: uint32(id)})
		cancel()
		switch {
		case err == nil, errors.Is(err, unix.ENODEV):
			return true, nil
		case errors.Is(err, unix.EINTR): // it was waiting for openers
			return false, nil
		case ctx.Err() != nil, !errors.Is(err, context.DeadlineExceeded):
			return false, err
		}
		// The command had not come to that wait, because the machine is slow or
		// another device is being deleted.
	}
}

// classPath is the directory with an entry ublkcN for each device.
const classPath = "/sys/class/ublk-char"

func (c *control) list(ctx context.Context) ([]Info, error) {
	entries, err := os.ReadDir(classPath)
	if err != nil {
		return nil, fmt.Errorf("list ublk devices: %w", err)
	}
	var infos []Info
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "ublkc")
		id, err := strconv.Atoi(name)
		if !ok || err != nil {
			continue
		}
		i, err := c.info(ctx, id)
		if errors.Is(err, ErrNoDevice) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, i)
	}
	slices.SortFunc(infos, func(a, b Info) int { return cmp.Compare(a.ID, b.ID) })
	return infos, nil
}

func (c *control) features(ctx context.Context) (Features, error) {
	var b [8]byte
	err := c.do(ctx, call{cmd: getFeatures, id: anyID, buf: b[:]})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("%w of Linux 6.5 or newer: %w", ErrNoDriver, err)
	}
	return Features(binary.NativeEndian.Uint64(b[:])), err
}

func (c *control) info(ctx context.Context, id int) (Info, error) {
	d, err := c.rawInfo(ctx, id)
	return infoOf(&d), err
}

func (c *control) rawInfo(ctx context.Context, id int) (devInfo, error) {
	var d devInfo
	err := c.do(ctx, call{cmd: getDevInfo, id: uint32(id), buf: bytesOf(&d)})
	switch {
	case errors.Is(err, unix.ENODEV):
		return d, fmt.Errorf("ublk device %d: %w: %w", id, ErrNoDevice, err)
	case err != nil:
		return d, fmt.Errorf("ublk device %d: %w", id, err)
	}
	return d, nil
}

// bytesOf returns the memory of an ABI structure.
func bytesOf[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}
