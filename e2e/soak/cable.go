package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// cable connects two TUN devices, in a network namespace each, and treats packets
// badly. It needs no module like tc-netem.
type cable struct {
	ends      [2]*os.File
	condition atomic.Pointer[condition]
	packets   atomic.Int64
	harmed    atomic.Int64 // lost, sent twice, damaged or overtaken
}

// condition is how packets are treated, in both directions; the fractions are of all
// packets.
type condition struct {
	name                           string
	lost, doubled, damaged, slowed float64
	delay, jitter                  time.Duration // of those that are slowed; others overtake them
}

func (c condition) String() string { return c.name }

const cableMTU = 4200

// newCable makes the devices. Each is in the network namespace of its name.
func newCable(names [2]string) (*cable, error) {
	c := &cable{}
	c.condition.Store(&condition{})
	for i, name := range names {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("open /dev/net/tun: %w", err)
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return nil, err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return nil, fmt.Errorf("make TUN device %s: %w", name, err)
		}
		c.ends[i] = os.NewFile(uintptr(fd), "/dev/net/tun")
	}
	go c.carry(c.ends[0], c.ends[1])
	go c.carry(c.ends[1], c.ends[0])
	return c, nil
}

// carry takes packets from one end to the other.
func (c *cable) carry(from, to *os.File) {
	buf := make([]byte, 65536)
	for {
		n, err := from.Read(buf)
		if err != nil {
			fatalf("cable: %v", err)
		}
		c.packets.Add(1)
		state := c.condition.Load()
		if hit(state.lost) {
			c.harmed.Add(1)
			continue
		}
		packet := buf[:n]
		if hit(state.damaged) && damage(packet) {
			c.harmed.Add(1)
		}
		copies := 1
		if hit(state.doubled) {
			c.harmed.Add(1)
			copies = 2
		}
		for range copies {
			if !hit(state.slowed) {
				write(to, packet)
				continue
			}
			c.harmed.Add(1)
			later := append([]byte(nil), packet...)
			delay := state.delay + time.Duration(rand.Int64N(int64(state.jitter)+1))
			time.AfterFunc(delay, func() { write(to, later) })
		}
	}
}

func hit(fraction float64) bool { return fraction > 0 && rand.Float64() < fraction }

// write leaves out what the other end cannot take: a packet that is lost.
func write(to *os.File, packet []byte) { _, _ = to.Write(packet) }

// damage flips a bit of an IPv4 packet's UDP payload, and takes the UDP checksum away,
// so that the damage is not noticed before RoCE's own checksum. It says whether it did.
func damage(packet []byte) bool {
	const udp = 17
	if len(packet) < 20 || packet[0]>>4 != 4 || packet[9] != udp {
		return false
	}
	header := int(packet[0]&15) * 4
	if len(packet) <= header+8 {
		return false
	}
	packet[header+6], packet[header+7] = 0, 0
	packet[header+8+rand.IntN(len(packet)-header-8)] ^= 1 << rand.IntN(8)
	return true
}
