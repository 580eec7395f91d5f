package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"structs"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sizes of the socket layer
const (
	recvMessages = 32       // datagrams, or groups of them, per recvmmsg
	recvBytes    = 64 << 10 // the most that UDP_GRO joins
	socketBuffer = 32 << 20 // requested size in bytes
	controlLen   = 96       // room for IP(V6)_PKTINFO, IP_TOS and UDP_SEGMENT or UDP_GRO
)

// Explicit congestion notification, in the low bits of the type of service.
const (
	ecnMask      = 3
	ecnCapable   = 2 // routers mark packets instead of dropping them
	ecnCongested = 3
)

// message is struct mmsghdr of 64-bit Linux.
type message struct {
	_   structs.HostLayout
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

var _ [64]byte = [unsafe.Sizeof(message{})]byte{}

// socket is an unconnected UDP socket with path MTU discovery. This makes the kernel send
// IPv4 packets with "don't fragment" and with identification 0, or k in the k-th segment
// of a UDP_SEGMENT message. The ICRC covers both.
//
// It is not a socket of package net, because the runtime's poller would wake a thread for
// every packet, even if another thread receives the packet.
type socket struct {
	fd    int
	v4    bool
	local netip.AddrPort // the bound address; its zone is canonical
	gso   atomic.Bool    // UDP_SEGMENT works
	gro   bool
	hasty bool // see socketConfig
	// recvBuffer is the number of bytes of packets that can wait before some are
	// lost. It includes the kernel's overhead.
	recvBuffer int

	// Used by receive; its caller ensures that only one call runs at a time.
	buf   []byte
	names [recvMessages]unix.RawSockaddrInet6
	ctls  [recvMessages][controlLen]byte
	iovs  [recvMessages]unix.Iovec
	msgs  [recvMessages]message
	used  int // number of messages whose length fields must be reset
}

// openSocket binds to an address, which may be the unspecified one of its family.
func openSocket(local netip.AddrPort, cfg socketConfig) (*socket, error) {
	s := &socket{v4: local.Addr().Is4()}
	if err := s.bind(local, cfg); err != nil {
		return nil, fmt.Errorf("open RoCE socket on %s: %w", local, err)
	}
	s.used = recvMessages
	s.buf = make([]byte, recvMessages*recvBytes)
	for i := range s.msgs {
		s.iovs[i].Base = &s.buf[i*recvBytes]
		s.iovs[i].SetLen(recvBytes)
		h := &s.msgs[i].hdr
		h.Iov, h.Name, h.Control = &s.iovs[i], (*byte)(unsafe.Pointer(&s.names[i])), &s.ctls[i][0]
		h.SetIovlen(1)
	}
	return s, nil
}

func (s *socket) bind(local netip.AddrPort, cfg socketConfig) error {
	family := unix.AF_INET6
	if s.v4 {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	s.fd, s.hasty = fd, cfg.hasty
	if err := s.configure(fd, cfg); err != nil {
		return errors.Join(err, s.close())
	}
	name, length := sockaddrOf(local)
	if _, _, errno := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&name)), uintptr(length)); errno != 0 {
		return errors.Join(os.NewSyscallError("bind", errno), s.close())
	}
	length = unix.SizeofSockaddrInet6
	if _, _, errno := unix.Syscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&name)), uintptr(unsafe.Pointer(&length))); errno != 0 {
		return errors.Join(os.NewSyscallError("getsockname", errno), s.close())
	}
	bound := addrOf(&name)
	s.local = netip.AddrPortFrom(withScope(bound.Addr(), name.Scope_id), bound.Port())
	return nil
}

// socketConfig configures a socket.
type socketConfig struct {
	plain bool // no segmentation offload, as on a kernel without it
	share bool // the port may be that of another socket of this provider
	hasty bool // a packet that finds no room in the socket's buffer is dropped at once
	ecn   int  // ECN bits of the packets that it sends
	// buffer is the requested size of both buffers, in bytes.
	buffer int
}

// configure sets the options before the bind.
func (s *socket) configure(fd int, cfg socketConfig) error {
	type option struct{ level, name, value int }
	must := []option{
		{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO},
		{unix.IPPROTO_IP, unix.IP_PKTINFO, 1},
		{unix.IPPROTO_IP, unix.IP_TOS, cfg.ecn},
		{unix.IPPROTO_IP, unix.IP_RECVTOS, 1},
	}
	if !s.v4 {
		must = []option{
			{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_TCLASS, cfg.ecn},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1},
			{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1}, // rdma_rxe sends no checksum
		}
	}
	if cfg.share {
		must = append(must, option{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1})
	}
	for _, o := range must {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set socket option %d/%d: %w", o.level, o.name, err)
		}
	}
	for _, o := range []option{
		{unix.SOL_SOCKET, unix.SO_RCVBUF, cfg.buffer}, {unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, cfg.buffer},
		{unix.SOL_SOCKET, unix.SO_SNDBUF, cfg.buffer}, {unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, cfg.buffer},
	} {
		_ = unix.SetsockoptInt(fd, o.level, o.name, o.value) // the FORCE options need CAP_NET_ADMIN; the kernel limits the others
	}
	var err error
	if s.recvBuffer, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil {
		return fmt.Errorf("get size of receive buffer: %w", err)
	}
	if !cfg.plain {
		s.gso.Store(unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 0) == nil)
		s.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	}
	return nil
}

func (s *socket) close() error { return os.NewSyscallError("close", unix.Close(s.fd)) }

// receive receives the datagrams that have arrived, without waiting. The messages stay
// valid until the next call. The system call is raw, because the scheduler need not know
// about a call that does not block.
func (s *socket) receive() (int, error) {
	for i := range s.msgs[:s.used] {
		h := &s.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlLen)
	}
	s.used = 0
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.msgs[0])), recvMessages,
		unix.MSG_DONTWAIT, 0, 0)
	switch errno {
	case 0:
		s.used = int(n)
		return s.used, nil
	case unix.EAGAIN, unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH:
		return 0, nil
	}
	return 0, os.NewSyscallError("recvmmsg", errno)
}

// arrival describes a message that recvmmsg returned.
type arrival struct {
	src, dst netip.AddrPort // without zones
	scope    uint32         // interface by which it arrived, if one of the addresses is link-local
	data     []byte
	segment  int // bytes per datagram; the last one may be shorter
	// congested means that a router is about to drop packets (RFC 3168). All
	// datagrams that were joined have the same value.
	congested bool
}

// arrived describes message i. It returns false if the message makes no sense.
func (s *socket) arrived(i int) (a arrival, ok bool) {
	h, n := &s.msgs[i].hdr, int(s.msgs[i].len)
	if h.Flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n == 0 {
		return a, false
	}
	a.data, a.segment = s.buf[i*recvBytes:i*recvBytes+n], n
	a.src = addrOf(&s.names[i])
	dst := s.local.Addr()
	for c := s.ctls[i][:h.Controllen]; len(c) >= unix.SizeofCmsghdr; {
		ch := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
		length := int(ch.Len)
		if length < unix.SizeofCmsghdr || length > len(c) {
			break
		}
		d := c[unix.SizeofCmsghdr:length]
		switch {
		case ch.Level == unix.IPPROTO_UDP && ch.Type == unix.UDP_GRO && len(d) >= 2:
			// It was always an int, but some kernels write only 16 bits of
			// it.
			a.segment = int(binary.NativeEndian.Uint16(d))
		case ch.Level == unix.IPPROTO_IP && ch.Type == unix.IP_PKTINFO && len(d) >= unix.SizeofInet4Pktinfo:
			dst = netip.AddrFrom4([4]byte(d[8:12]))
		case ch.Level == unix.IPPROTO_IPV6 && ch.Type == unix.IPV6_PKTINFO && len(d) >= unix.SizeofInet6Pktinfo:
			dst = netip.AddrFrom16([16]byte(d[:16]))
			if dst.IsLinkLocalUnicast() || a.src.Addr().IsLinkLocalUnicast() {
				a.scope = binary.NativeEndian.Uint32(d[16:])
			}
		case ch.Level == unix.IPPROTO_IP && ch.Type == unix.IP_TOS && len(d) >= 1:
			a.congested = d[0]&ecnMask == ecnCongested
		case ch.Level == unix.IPPROTO_IPV6 && ch.Type == unix.IPV6_TCLASS && len(d) >= 4:
			a.congested = binary.NativeEndian.Uint32(d)&ecnMask == ecnCongested
		}
		c = c[min(unix.CmsgSpace(length-unix.SizeofCmsghdr), len(c)):]
	}
	a.dst = netip.AddrPortFrom(dst, s.local.Port())
	return a, a.segment > 0
}

// addrOf returns a socket address without the zone. The port is at the same offset in
// both families.
func addrOf(sa *unix.RawSockaddrInet6) netip.AddrPort {
	port := sa.Port>>8 | sa.Port<<8
	if sa.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port)
}

// sockaddrOf is the reverse of addrOf. It also returns the length.
func sockaddrOf(a netip.AddrPort) (sa unix.RawSockaddrInet6, length uint32) {
	port := a.Port()>>8 | a.Port()<<8
	if a.Addr().Is4() {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&sa)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: a.Addr().As4()}
		return sa, unix.SizeofSockaddrInet4
	}
	return unix.RawSockaddrInet6{
		Family: unix.AF_INET6, Port: port, Addr: a.Addr().As16(), Scope_id: scopeOf(a.Addr()),
	}, unix.SizeofSockaddrInet6
}

// path is the way to a peer: canonical addresses, and what sendmsg needs for them.
type path struct {
	sock          *socket
	local, remote netip.AddrPort
	name          unix.RawSockaddrInet6
	nameLen       uint32
	control       [controlLen]byte // the source address and the type of service
	controlLen    int
}

// newPath makes a path. tos is the type of service, or negative. Its low bits are
// ignored.
func newPath(s *socket, local netip.Addr, remote netip.AddrPort, tos int) *path {
	p := new(path)
	p.set(s, local, remote, tos)
	return p
}

// set replaces the contents of p.
func (p *path) set(s *socket, local netip.Addr, remote netip.AddrPort, tos int) {
	*p = path{sock: s, local: netip.AddrPortFrom(local, s.local.Port()), remote: remote}
	p.name, p.nameLen = sockaddrOf(remote)
	if s.v4 {
		var info [unix.SizeofInet4Pktinfo]byte
		src := local.As4()
		copy(info[4:8], src[:])
		p.add(unix.IPPROTO_IP, unix.IP_PKTINFO, info[:])
	} else {
		var info [unix.SizeofInet6Pktinfo]byte
		src := local.As16()
		copy(info[:], src[:])
		binary.NativeEndian.PutUint32(info[16:], scopeOf(local))
		p.add(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, info[:])
	}
	if tos >= 0 {
		v := binary.NativeEndian.AppendUint32(nil, uint32(tos&^ecnMask|ecnCapable))
		if s.v4 {
			p.add(unix.IPPROTO_IP, unix.IP_TOS, v)
		} else {
			p.add(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, v)
		}
	}
}

// scope returns the interface of link-local addresses, or 0 if neither address is
// link-local.
func (p *path) scope() uint32 { return max(scopeOf(p.local.Addr()), scopeOf(p.remote.Addr())) }

func (p *path) namePtr() *byte { return (*byte)(unsafe.Pointer(&p.name)) }

func (p *path) add(level, kind int, data []byte) {
	p.controlLen += putControl(p.control[p.controlLen:], level, kind, data)
}

// putControl writes a control message and returns its length.
func putControl(b []byte, level, kind int, data []byte) int {
	h := unix.Cmsghdr{Level: int32(level), Type: int32(kind)}
	h.SetLen(unix.CmsgLen(len(data)))
	*(*unix.Cmsghdr)(unsafe.Pointer(&b[0])) = h
	copy(b[unix.SizeofCmsghdr:], data)
	return unix.CmsgSpace(len(data))
}

// sendTimeoutMs limits the time to wait for room in the socket's buffer, in milliseconds.
const sendTimeoutMs = 20

// send sends messages. Messages that the network does not accept are lost, as on the
// wire. The only error is EMSGSIZE: the path's MTU is smaller than it was at first.
func (s *socket) send(msgs []message) error {
	for waited := false; len(msgs) > 0; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)),
			unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			msgs, waited = msgs[n:], false
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && !waited && !s.hasty:
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, sendTimeoutMs)
			waited = true
		case errno == unix.EMSGSIZE:
			return unix.EMSGSIZE
		case (errno == unix.EIO || errno == unix.EINVAL) && s.gso.Load():
			// The device cannot segment. These packets were numbered for
			// segmentation, so they are lost. From now on, packets are sent
			// one by one.
			s.gso.Store(false)
			return nil
		default:
			msgs = msgs[1:]
		}
	}
	return nil
}
