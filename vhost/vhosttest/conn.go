// Package vhosttest is a front end of vhost-user-blk for tests: a virtual machine without
// a CPU. It is written from the specifications (docs/interop/vhost-user.rst of QEMU,
// virtio 1.2) and shares no code with package vhost.
//
// Conn sends messages, also malformed ones. Guest has memory and rings, which live longer
// than a connection, and executes requests.
package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Numbers of the messages that the tests send.
const (
	GetFeatures         = 1
	SetFeatures         = 2
	SetOwner            = 3
	SetMemTable         = 5
	SetLogBase          = 6
	SetVringNum         = 8
	SetVringAddr        = 9
	SetVringBase        = 10
	GetVringBase        = 11
	SetVringKick        = 12
	SetVringCall        = 13
	GetProtocolFeatures = 15
	SetProtocolFeatures = 16
	GetQueueNum         = 17
	SetVringEnable      = 18
	SetBackendReqFD     = 21
	GetConfig           = 24
	SetConfig           = 25
	GetInflightFD       = 31
	SetInflightFD       = 32
	ResetDevice         = 34
	GetMaxMemSlots      = 36
	AddMemReg           = 37
	RemMemReg           = 38
)

// Feature bits.
const (
	FeatReadOnly         = 1 << 5
	FeatFlush            = 1 << 9
	FeatDiscard          = 1 << 13
	FeatWriteZeroes      = 1 << 14
	FeatLogAll           = 1 << 26
	FeatIndirect         = 1 << 28
	FeatEventIdx         = 1 << 29
	FeatProtocolFeatures = 1 << 30
	FeatVersion1         = 1 << 32

	ProtoReplyAck = 1 << 3
)

const (
	version   = 1
	needReply = 1 << 3
	isReply   = 1 << 2
)

// patience is the longest time that a test waits for the back end.
const patience = 20 * time.Second

// Conn is a connection to a back end.
type Conn struct {
	c   *net.UnixConn
	Ack bool // ask for replies (REPLY_ACK)
}

// Dial connects to the socket of a back end.
func Dial(path string) (*Conn, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &Conn{c: c}, nil
}

// NewConn returns a connection over a socket that is connected.
func NewConn(c *net.UnixConn) *Conn { return &Conn{c: c} }

// Close hangs up.
func (c *Conn) Close() error { return c.c.Close() }

// Raw sends bytes with file descriptors.
func (c *Conn) Raw(b []byte, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := c.c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, _, err := c.c.WriteMsgUnix(b, oob, nil)
	return err
}

// Header returns the header of a message.
func Header(request, flags uint32, size int) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, request)
	b = le.AppendUint32(b, flags)
	return le.AppendUint32(b, uint32(size))
}

// Send sends a message. With Ack, it waits for the back end's acknowledgment.
func (c *Conn) Send(request uint32, payload []byte, fds ...int) error {
	flags := uint32(version)
	if c.Ack {
		flags |= needReply
	}
	if err := c.Raw(append(Header(request, flags, len(payload)), payload...), fds...); err != nil {
		return fmt.Errorf("send message %d: %w", request, err)
	}
	if !c.Ack {
		return nil
	}
	p, _, err := c.Receive(request)
	if err != nil {
		return err
	}
	if len(p) != 8 || binary.LittleEndian.Uint64(p) != 0 {
		return fmt.Errorf("message %d was refused: % x", request, p)
	}
	return nil
}

// Ask sends a message that has a reply, and returns the reply's payload and descriptors.
func (c *Conn) Ask(request uint32, payload []byte, fds ...int) ([]byte, []int, error) {
	if err := c.Raw(append(Header(request, version, len(payload)), payload...), fds...); err != nil {
		return nil, nil, fmt.Errorf("send message %d: %w", request, err)
	}
	return c.Receive(request)
}

// Receive receives the reply to a message.
func (c *Conn) Receive(request uint32) ([]byte, []int, error) {
	header, oob := make([]byte, 12), make([]byte, unix.CmsgSpace(4*8))
	n, oobn, _, _, err := c.c.ReadMsgUnix(header, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil && n < len(header) {
		_, err = io.ReadFull(c.c, header[n:])
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reply to message %d: %w", request, err)
	}
	le := binary.LittleEndian
	if got, flags := le.Uint32(header), le.Uint32(header[4:]); got != request || flags&isReply == 0 {
		return nil, nil, fmt.Errorf("reply to message %d: message %d with flags %#x", request, got, flags)
	}
	payload := make([]byte, le.Uint32(header[8:]))
	if _, err := io.ReadFull(c.c, payload); err != nil {
		return nil, nil, fmt.Errorf("reply to message %d: %w", request, err)
	}
	var fds []int
	if oobn > 0 {
		all, err := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range all {
			got, perr := unix.ParseUnixRights(&all[i])
			fds, err = append(fds, got...), errors.Join(err, perr)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return payload, fds, nil
}

// AskU64 asks for a number.
func (c *Conn) AskU64(request uint32) (uint64, error) {
	p, _, err := c.Ask(request, nil)
	if err != nil {
		return 0, err
	}
	if len(p) != 8 {
		return 0, fmt.Errorf("reply to message %d has %d bytes", request, len(p))
	}
	return binary.LittleEndian.Uint64(p), nil
}

// AwaitEnd waits until the back end hangs up.
func (c *Conn) AwaitEnd() error { return c.AwaitEndFor(patience) }

// AwaitEndFor is AwaitEnd with another limit. It reads nothing, so another goroutine may wait for
// a reply.
func (c *Conn) AwaitEndFor(limit time.Duration) error {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	lost := raw.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(lost, err); err != nil {
		return err
	}
	defer unix.Close(fd)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll(p, int(time.Until(end).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("the back end has not hung up within %v", limit)
		default:
			return nil
		}
	}
}

// U64 is a payload of one number.
func U64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// State is the payload of the messages about a number of a ring.
func State(ring, num uint32) []byte { return U64(uint64(num)<<32 | uint64(ring)) }

// CloseBoth ends both directions. Another goroutine may wait in AwaitEnd.
func (c *Conn) CloseBoth() error { return errors.Join(c.c.CloseRead(), c.c.CloseWrite()) }

// CloseWrite ends the direction to the back end.
func (c *Conn) CloseWrite() { _ = c.c.CloseWrite() }
