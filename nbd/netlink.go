package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Numbers of include/uapi/linux/nbd-netlink.h
const (
	genlName    = "nbd"
	genlVersion = 1

	nlConnect     = 1 // NBD_CMD_CONNECT
	nlDisconnect  = 2
	nlReconfigure = 3

	attrIndex       = 1 // NBD_ATTR_INDEX, u32
	attrSize        = 2 // u64, bytes
	attrBlockSize   = 3 // u64, bytes
	attrTimeout     = 4 // u64, seconds
	attrServerFlags = 5 // u64
	attrSockets     = 7 // nest of attrSocketItem
	attrDeadConn    = 8 // u64, seconds
	attrBackend     = 10

	attrSocketItem = 1 // NBD_SOCK_ITEM, nest
	attrSocketFD   = 1 // NBD_SOCK_FD, u32
)

// attributes is a sequence of netlink attributes.
type attributes []byte

func (a attributes) add(kind uint16, value []byte) attributes {
	ne := binary.NativeEndian
	a = ne.AppendUint16(a, uint16(unix.SizeofNlAttr+len(value)))
	a = ne.AppendUint16(a, kind)
	a = append(a, value...)
	return append(a, make([]byte, -len(a)&(unix.NLA_ALIGNTO-1))...)
}

func (a attributes) u32(kind uint16, v uint32) attributes {
	return a.add(kind, binary.NativeEndian.AppendUint32(nil, v))
}

func (a attributes) u64(kind uint16, v uint64) attributes {
	return a.add(kind, binary.NativeEndian.AppendUint64(nil, v))
}

func (a attributes) text(kind uint16, v string) attributes { return a.add(kind, append([]byte(v), 0)) }

// sockets adds the descriptors in the form that CONNECT and RECONFIGURE need.
func (a attributes) sockets(fds []int) attributes {
	var all attributes
	for _, fd := range fds {
		all = all.add(attrSocketItem|unix.NLA_F_NESTED, attributes(nil).u32(attrSocketFD, uint32(fd)))
	}
	return a.add(attrSockets|unix.NLA_F_NESTED, all)
}

// find returns the value of the first attribute of a kind, or nil.
func (a attributes) find(kind uint16) []byte {
	ne := binary.NativeEndian
	for len(a) >= unix.SizeofNlAttr {
		length := int(ne.Uint16(a))
		if length < unix.SizeofNlAttr || length > len(a) {
			return nil
		}
		if ne.Uint16(a[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == kind {
			return a[unix.SizeofNlAttr:length]
		}
		a = a[min(len(a), (length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1)):]
	}
	return nil
}

// genetlink is a socket for a family of generic netlink.
type genetlink struct {
	fd     int
	family uint16
	seq    uint32
}

// openKernel finds the kernel's NBD client. Errors: ErrNoDriver, and errors of the
// system.
func openKernel() (*genetlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("open generic netlink: %w", err)
	}
	g := &genetlink{fd: fd, family: unix.GENL_ID_CTRL}
	found, err := g.exchange(unix.CTRL_CMD_GETFAMILY, attributes(nil).text(unix.CTRL_ATTR_FAMILY_NAME, genlName))
	id := found.find(unix.CTRL_ATTR_FAMILY_ID)
	switch {
	case errors.Is(err, unix.ENOENT):
		err = fmt.Errorf("%w: %w", ErrNoDriver, err)
	case err == nil && len(id) != 2:
		err = fmt.Errorf("%w: its netlink family has no number", ErrNoDriver)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	g.family = binary.NativeEndian.Uint16(id)
	return g, nil
}

const genlHeader = unix.NLMSG_HDRLEN + unix.GENL_HDRLEN

// exchange sends a command and reads the answer: attributes, if there are any, and the
// acknowledgement.
func (g *genetlink) exchange(cmd uint8, attrs attributes) (attributes, error) {
	ne := binary.NativeEndian
	g.seq++
	m := ne.AppendUint32(nil, uint32(genlHeader+len(attrs)))
	m = ne.AppendUint16(m, g.family)
	m = ne.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = ne.AppendUint32(m, g.seq)
	m = ne.AppendUint32(m, 0) // the kernel fills in the sender
	m = append(m, cmd, genlVersion, 0, 0)
	if err := unix.Sendto(g.fd, append(m, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var answer attributes
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(g.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		for b := buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			length := int(ne.Uint32(b))
			if length < unix.NLMSG_HDRLEN || length > len(b) {
				return nil, errors.New("malformed netlink message")
			}
			body := b[unix.NLMSG_HDRLEN:length]
			kind, seq := ne.Uint16(b[4:]), ne.Uint32(b[8:])
			b = b[min(len(b), (length+3)&^3):]
			switch {
			case seq != g.seq:
			case kind == unix.NLMSG_ERROR && len(body) >= 4:
				if errno := -int32(ne.Uint32(body)); errno != 0 {
					return nil, unix.Errno(errno)
				}
				return answer, nil
			case kind == g.family && len(body) >= unix.GENL_HDRLEN:
				answer = append(attributes(nil), body[unix.GENL_HDRLEN:]...)
			}
		}
	}
}

func (g *genetlink) close() error { return unix.Close(g.fd) }

// kernelDo executes a command and waits for its end. If ctx is done first, kernelDo
// returns, and the command continues.
func kernelDo(ctx context.Context, cmd uint8, attrs attributes) (answer attributes, err error) {
	type result struct {
		answer attributes
		err    error
	}
	done := make(chan result, 1)
	go func() {
		g, err := openKernel()
		if err != nil {
			done <- result{nil, err}
			return
		}
		answer, err := g.exchange(cmd, attrs)
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: %w", ErrPermission, err)
		}
		done <- result{answer, errors.Join(err, g.close())}
	}()
	select {
	case r := <-done:
		return r.answer, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// wholeSeconds returns d in seconds, rounded up.
func wholeSeconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }
