package host

import (
	"encoding/binary"
	"errors"
	"maps"
	"testing"

	"golang.org/x/sys/unix"
)

// attribute makes a netlink attribute.
func attribute(kind uint16, value ...byte) []byte {
	ne := binary.NativeEndian
	a := ne.AppendUint16(nil, uint16(4+len(value)))
	a = ne.AppendUint16(a, kind)
	a = append(a, value...)
	return append(a, make([]byte, -len(a)&3)...)
}

// answer makes a netlink message.
func answer(kind uint16, payload ...byte) []byte {
	ne := binary.NativeEndian
	m := ne.AppendUint32(nil, uint32(16+len(payload)))
	m = ne.AppendUint16(m, kind)
	return append(append(m, make([]byte, 10)...), payload...)
}

// dcbAnswer is that of an adapter with flow control on priority 3, to which it maps DSCP 26.
func dcbAnswer() []byte {
	app := func(selector, priority byte, protocol uint16) []byte {
		return attribute(1, append([]byte{selector, priority}, binary.NativeEndian.AppendUint16(nil, protocol)...)...)
	}
	apps := append(append(app(5, 3, 26), app(5, 6, 48)...), app(1, 2, 0x8906)...) // FCoE is no DSCP
	ieee := append(attribute(1, make([]byte, 59)...), attribute(2, append([]byte{8, 1 << 3, 0}, make([]byte, 130)...)...)...)
	ieee = append(ieee, attribute(3|unix.NLA_F_NESTED, apps...)...)
	payload := append([]byte{0, 21, 0, 0}, attribute(1, []byte("eth0\x00")...)...)
	return answer(unix.RTM_GETDCB, append(payload, attribute(13|unix.NLA_F_NESTED, ieee...)...)...)
}

func TestParseDCB(t *testing.T) {
	whole := dcbAnswer()
	d, err := parseDCB(whole)
	if want := map[uint8]uint8{26: 3, 48: 6}; err != nil || d.PFC != 1<<3 || !maps.Equal(d.DSCP, want) {
		t.Errorf("%+v, %v", d, err)
	}
	for n := range whole { // none of them panics
		_, _ = parseDCB(whole[:n])
	}
	if _, err := parseDCB(whole[:19]); !errors.Is(err, errShort) {
		t.Error(err)
	}
	no := answer(unix.NLMSG_ERROR, append(binary.NativeEndian.AppendUint32(nil, ^uint32(unix.EOPNOTSUPP-1)), make([]byte, 16)...)...)
	if _, err := parseDCB(no); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Error(err)
	}
}

// The loopback device has no priorities, and a device that does not exist is an error.
func TestReadDCB(t *testing.T) {
	if d, ok, err := ReadDCB("lo"); ok || err != nil {
		t.Errorf("lo: %+v, %v, %v", d, ok, err)
	}
	if _, ok, err := ReadDCB("none9"); ok || err == nil {
		t.Errorf("none9: %v, %v", ok, err)
	}
}
