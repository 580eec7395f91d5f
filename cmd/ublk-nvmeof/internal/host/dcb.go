package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"golang.org/x/sys/unix"
)

// DCB is how a network device treats traffic of different priorities (IEEE 802.1Q, data
// center bridging).
type DCB struct {
	PFC  uint8           // bit p: priority p has priority flow control
	DSCP map[uint8]uint8 // priority of a DSCP, where the device maps it
}

// Numbers of include/uapi/linux/dcbnl.h
const (
	dcbIEEEGet   = 21 // DCB_CMD_IEEE_GET
	dcbAttrName  = 1  // DCB_ATTR_IFNAME
	dcbAttrIEEE  = 13 // DCB_ATTR_IEEE, nest
	ieeePFC      = 2  // DCB_ATTR_IEEE_PFC, struct ieee_pfc
	ieeeAppTable = 3  // DCB_ATTR_IEEE_APP_TABLE, nest of struct dcb_app
	selectDSCP   = 5  // IEEE_8021QAZ_APP_SEL_DSCP
	dcbHeader    = 4  // struct dcbmsg
)

// ReadDCB asks the driver of a network device. ok is false if the driver does not tell.
func ReadDCB(netdev string) (d DCB, ok bool, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return DCB{}, false, fmt.Errorf("open netlink: %w", err)
	}
	defer unix.Close(fd)
	fail := func(err error) (DCB, bool, error) {
		return DCB{}, false, fmt.Errorf("ask %s for its priorities: %w", netdev, err)
	}
	if err := unix.Sendto(fd, dcbRequest(netdev), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fail(err)
	}
	buf := make([]byte, 64<<10)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return fail(err)
	}
	d, err = parseDCB(buf[:n])
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return DCB{}, false, nil
	case err != nil:
		return fail(err)
	}
	return d, true, nil
}

// dcbRequest makes the message that asks for everything of IEEE.
func dcbRequest(netdev string) []byte {
	ne := binary.NativeEndian
	name := append([]byte(netdev), 0)
	m := ne.AppendUint32(nil, 0) // the length, below
	m = ne.AppendUint16(m, unix.RTM_GETDCB)
	m = ne.AppendUint16(m, unix.NLM_F_REQUEST)
	m = ne.AppendUint32(m, 1)                       // sequence number
	m = ne.AppendUint32(m, 0)                       // port: the kernel knows it
	m = append(m, unix.AF_UNSPEC, dcbIEEEGet, 0, 0) // struct dcbmsg
	m = ne.AppendUint16(m, uint16(4+len(name)))
	m = ne.AppendUint16(m, dcbAttrName)
	m = append(m, name...)
	m = append(m, make([]byte, -len(m)&3)...)
	ne.PutUint32(m, uint32(len(m)))
	return m
}

var errShort = errors.New("the answer of the kernel is cut off")

// parseDCB reads the answer. An error of the kernel is an Errno.
func parseDCB(b []byte) (DCB, error) {
	ne := binary.NativeEndian
	if len(b) < unix.SizeofNlMsghdr+4 {
		return DCB{}, errShort
	}
	if ne.Uint16(b[4:]) == unix.NLMSG_ERROR {
		return DCB{}, unix.Errno(-int32(ne.Uint32(b[unix.SizeofNlMsghdr:])))
	}
	d := DCB{DSCP: map[uint8]uint8{}}
	for kind, value := range netlinkAttributes(b[unix.SizeofNlMsghdr+dcbHeader:]) {
		if kind != dcbAttrIEEE {
			continue
		}
		for kind, value := range netlinkAttributes(value) {
			switch {
			case kind == ieeePFC && len(value) >= 2:
				d.PFC = value[1] // pfc_en
			case kind == ieeeAppTable:
				for _, app := range netlinkAttributes(value) {
					if len(app) >= 4 && app[0] == selectDSCP {
						d.DSCP[uint8(ne.Uint16(app[2:]))] = app[1]
					}
				}
			}
		}
	}
	return d, nil
}

// netlinkAttributes visits the kinds and the values of a sequence of attributes.
func netlinkAttributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		ne := binary.NativeEndian
		for len(b) >= unix.SizeofNlAttr {
			length := int(ne.Uint16(b))
			if length < unix.SizeofNlAttr || length > len(b) {
				return
			}
			if !yield(ne.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:length]) {
				return
			}
			b = b[min(len(b), (length+3)&^3):]
		}
	}
}
