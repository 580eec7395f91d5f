//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr has room for an address of either family, in the form of the library.
type sockaddr unix.RawSockaddrInet6

func (s *sockaddr) c() *C.struct_sockaddr { return (*C.struct_sockaddr)(unsafe.Pointer(s)) }

// newSockaddr converts an address. The zone may be an interface name or index.
func newSockaddr(a netip.AddrPort) (*sockaddr, error) {
	s := new(sockaddr)
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&s.Port))[:], a.Port())
	switch addr := a.Addr().Unmap(); {
	case addr.Is4():
		s.Family = unix.AF_INET
		(*unix.RawSockaddrInet4)(unsafe.Pointer(s)).Addr = addr.As4()
	case addr.Is6():
		s.Family, s.Addr = unix.AF_INET6, addr.As16()
		scope, err := scopeID(addr.Zone())
		if err != nil {
			return nil, err
		}
		s.Scope_id = scope
	default:
		return nil, fmt.Errorf("address is not set: %w", unix.EINVAL)
	}
	return s, nil
}

// addrPort is the reverse of newSockaddr. The zone is an interface name if there is one.
func addrPort(c *C.struct_sockaddr) netip.AddrPort {
	s := (*sockaddr)(unsafe.Pointer(c))
	switch s.Family {
	case unix.AF_INET:
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(s))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), s.port())
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr).WithZone(zone(s.Scope_id)), s.port())
	}
	return netip.AddrPort{}
}

func (s *sockaddr) port() uint16 {
	return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&s.Port))[:])
}

func scopeID(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	iface, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("zone %q: %w", zone, err)
	}
	return uint32(iface.Index), nil
}

func zone(scope uint32) string {
	if scope == 0 {
		return ""
	}
	if iface, err := net.InterfaceByIndex(int(scope)); err == nil {
		return iface.Name
	}
	return strconv.FormatUint(uint64(scope), 10)
}
