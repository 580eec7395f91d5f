package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Holder is who has a UDP port. PID is 0 if no process is known that has it.
type Holder struct {
	PID int
	UID uint32 // of the socket
}

// String describes the holder.
func (h Holder) String() string {
	switch {
	case h.PID != 0:
		return fmt.Sprintf("process %d (%s)", h.PID, Command(h.PID))
	case h.UID != 0:
		return fmt.Sprintf("a process of user %d", h.UID)
	case os.Geteuid() != 0:
		return "a process of root, or rdma_rxe in the kernel"
	}
	return "rdma_rxe in the kernel, or a process outside of this container"
}

// echoTime is how long a packet may take from this host to itself.
const echoTime = time.Second

// TryUDP sends a packet from an address of this host to itself, at a UDP port. Errors: that
// of the bind if somebody has the port, that of the system if it refuses to send, and
// os.ErrDeadlineExceeded if the packet does not arrive within a second.
func TryUDP(ctx context.Context, local netip.AddrPort) error {
	var listen net.ListenConfig
	server, err := listen.ListenPacket(ctx, "udp", local.String())
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()
	dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(local.Addr(), 0))}
	client, err := dialer.DialContext(ctx, "udp", local.String())
	if err != nil {
		return err
	}
	defer client.Close()
	sent := make([]byte, 16)
	_, _ = rand.Read(sent) // it does not fail
	if _, err := client.Write(sent); err != nil {
		return err
	}
	if err := server.SetReadDeadline(time.Now().Add(echoTime)); err != nil {
		return err
	}
	for got := make([]byte, 64); ; {
		n, _, err := server.ReadFrom(got)
		if err != nil || bytes.Equal(got[:n], sent) {
			return err
		}
	}
}

// UDPHolder finds out who has the UDP port in this network namespace, at the address or
// at one that includes it. ok is false if nobody is found.
func UDPHolder(local netip.AddrPort) (h Holder, ok bool) {
	for _, table := range []string{"/proc/net/udp", "/proc/net/udp6"} {
		text, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		if uid, inode, ok := findUDP(string(text), local); ok {
			return Holder{PID: socketOwner(inode), UID: uid}, true
		}
	}
	return Holder{}, false
}

// findUDP finds the socket that has a port, in the format of /proc/net/udp
// (udp4_format_sock in net/ipv4/udp.c).
func findUDP(table string, local netip.AddrPort) (uid uint32, inode string, ok bool) {
	for line := range strings.Lines(table) {
		f := strings.Fields(line) // sl, local address, remote address, st, queues, tr, retrnsmt, uid, timeout, inode
		if len(f) < 10 {
			continue
		}
		at, err := parseUDP(f[1])
		if err != nil || at.Port() != local.Port() {
			continue
		}
		a, b := at.Addr().Unmap(), local.Addr().Unmap()
		switch {
		case b.IsUnspecified(), a == b.WithZone(""):
		case a.IsUnspecified() && (at.Addr().Is6() || b.Is4()): // the IPv6 one may include IPv4
		default:
			continue
		}
		id, err := strconv.ParseUint(f[7], 10, 32)
		if err != nil {
			continue
		}
		return uint32(id), f[9], true
	}
	return 0, "", false
}

// parseUDP parses an address like 0100007F:12B7, whose words of four bytes have the byte
// order of the machine.
func parseUDP(text string) (netip.AddrPort, error) {
	digits, port, _ := strings.Cut(text, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	words, err := hex.DecodeString(digits)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i := 0; i+4 <= len(words); i += 4 {
		binary.NativeEndian.PutUint32(words[i:], binary.BigEndian.Uint32(words[i:]))
	}
	addr, ok := netip.AddrFromSlice(words)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// socketOwner returns a process that has a socket open, as far as this process may look,
// or 0.
func socketOwner(inode string) int {
	all, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0
	}
	for _, fd := range all {
		if target, err := os.Readlink(fd); err == nil && target == "socket:["+inode+"]" {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
			return pid
		}
	}
	return 0
}
