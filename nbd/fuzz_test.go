package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// fuzzed is a server of a device, with the expected contents of the device.
type fuzzed struct {
	s       *Server
	bad     uint64 // a sector that cannot be read or written
	block   uint64
	content []byte
	stale   []bool // bytes of which nothing is known, after an error
}

const fuzzSize = 512 << 10

func newFuzzed(f *testing.F, g block.Geometry) *fuzzed {
	z := &fuzzed{bad: 700, block: uint64(max(512, g.LogicalBlock)), content: make([]byte, fuzzSize), stale: make([]bool, fuzzSize)}
	g.Sectors = fuzzSize >> 9
	z.s, _ = newServer(f, Config{
		Exports: []Export{{Device: &badBlock{Device: newRAM(f, g), sector: z.bad}}}, Depth: 16, MaxIO: 4096, Loops: newLoops(f, 2),
	})
	return z
}

// link is a client of a fuzzed server.
type link struct {
	z          *fuzzed
	t          *testing.T
	fd         int
	structured bool
	gone       chan error
}

func (z *fuzzed) link(t *testing.T, structured bool) *link {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := &link{z, t, fds[1], structured, make(chan error, 1)}
	if err := unix.SetsockoptTimeval(l.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		t.Fatal(err)
	}
	go func() { l.gone <- z.s.transmit(nil, fds[0], z.s.find("").offer(structured), stallTicks) }()
	return l
}

func (l *link) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, b)
		if err == unix.EINTR {
			continue
		}
		if n == 0 && err == nil {
			err = io.EOF
		}
		return max(n, 0), err
	}
}

func (l *link) send(b []byte, cut int) {
	for len(b) > 0 {
		n, err := unix.SendmsgN(l.fd, b[:min(len(b), max(cut, 1))], nil, nil, unix.MSG_NOSIGNAL)
		if err != nil {
			return // it hung up
		}
		b, cut = b[n:], len(b)
	}
}

// reply reads the reply to a request: its data, its error, and whether the server has
// hung up.
func (l *link) reply(r request) (data []byte, e code, hungUp bool) {
	read := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(l, b); errors.Is(err, unix.EAGAIN) {
			l.t.Fatalf("no reply to %+v", r)
		} else if err != nil {
			hungUp = true
		}
		return b
	}
	be := binary.BigEndian
	if !l.structured || r.kind != cmdRead {
		b := read(simpleSize)
		if e = code(be.Uint32(b[4:])); !hungUp && (be.Uint32(b) != magicSimple || be.Uint64(b[8:]) != r.cookie) {
			l.t.Fatalf("reply %x to %+v", b, r)
		}
		if r.kind == cmdRead && e == 0 && !hungUp {
			data = read(int(r.length))
		}
		return data, e, hungUp
	}
	for {
		b := read(structuredSize)
		if hungUp {
			return data, e, true
		}
		content := read(int(be.Uint32(b[16:])))
		switch kind := be.Uint16(b[6:]); {
		case hungUp, be.Uint32(b) != magicStructured, be.Uint64(b[8:]) != r.cookie:
			l.t.Fatalf("chunk %x of the reply to %+v", b, r)
		case kind == chunkError:
			e = code(be.Uint32(content))
		case kind == chunkOffsetData && be.Uint64(content) == r.offset+uint64(len(data)):
			data = append(data, content[8:]...)
		default:
			l.t.Fatalf("chunk %x of the reply to %+v after %d bytes", b, r, len(data))
		}
		if b[5]&chunkDone != 0 {
			return data, e, false
		}
	}
}

// check compares a reply to a request with the expected one, and records the changes that
// the request has made.
func (l *link) check(r request, sent []byte, data []byte, e code) {
	z := l.z
	end := r.offset + uint64(r.length)
	valid := r.kind == cmdFlush && r.offset == 0 && r.length == 0 ||
		(r.kind <= cmdWrite || r.kind == cmdTrim || r.kind == cmdZeroes) && r.length > 0 && end <= fuzzSize
	if !valid {
		if e == 0 {
			l.t.Errorf("%+v is done", r)
		}
		return
	}
	first, last := r.offset/z.block, (end+z.block-1)/z.block // in blocks
	whole, rest := (r.offset+z.block-1)/z.block, end/z.block
	bad := z.bad << 9 / z.block
	hit := r.kind != cmdFlush && first <= bad && bad < last
	if r.kind == cmdTrim {
		hit = whole <= bad && bad < rest
	}
	if hit != (e != 0) {
		l.t.Errorf("%+v: error %d", r, e)
	}
	switch {
	case r.kind == cmdRead && e == 0:
		for i, b := range data {
			if at := int(r.offset) + i; b != z.content[at] && !z.stale[at] {
				l.t.Fatalf("%+v: byte %d is %#x, want %#x", r, i, b, z.content[at])
			}
		}
	case r.kind == cmdRead, r.kind == cmdFlush:
	case e != 0: // nothing is known of all that is touched
		for at := first * z.block; at < last*z.block; at++ {
			z.stale[at] = true
		}
	case r.kind == cmdTrim:
		for at := whole * z.block; at < rest*z.block; at++ {
			z.content[at], z.stale[at] = 0, false
		}
	default:
		for at := r.offset; at < end; at++ {
			z.content[at], z.stale[at] = 0, false
		}
		copy(z.content[r.offset:], sent)
	}
}

// FuzzConnection makes two clients on two loops send requests of any kind, size and
// alignment, and compares all replies with the expected ones. One of the clients
// disconnects in the middle of a request.
func FuzzConnection(f *testing.F) {
	op := func(kind command, flags uint16, offset, length uint32, cut uint16) []byte {
		b := []byte{byte(kind), byte(flags)}
		b = binary.BigEndian.AppendUint32(b, offset)
		b = binary.BigEndian.AppendUint32(b, length)
		return binary.BigEndian.AppendUint16(b, cut)
	}
	f.Add(byte(0), bytes.Join([][]byte{op(cmdWrite, 0, 0, 4096, 30), op(cmdRead, 0, 0, 100000, 3), op(cmdFlush, 0, 0, 0, 28)}, nil))
	f.Add(byte(3), bytes.Join([][]byte{op(cmdWrite, 1, 100, 9000, 1000), op(cmdZeroes, 3, 1000, 5000, 28), op(cmdTrim, 1, 1, 20000, 9), op(cmdRead, 4, 0, 30000, 28)}, nil))
	f.Add(byte(6), bytes.Join([][]byte{op(cmdRead, 0, 0, fuzzSize, 28), op(cmdWrite, 0, 350000, 30000, 28), op(cmdRead, 0, 358400, 1, 28), op(99, 7, 0, 1, 5)}, nil))
	f.Add(byte(5), bytes.Join([][]byte{op(cmdWrite, 0, 0, 500000, 60000), op(cmdWrite, 0, 500000, 20000, 28), op(cmdRead, 0, 1, 300000, 28)}, nil))
	runtime.GOMAXPROCS(max(3, runtime.GOMAXPROCS(0))) // a worker of go test -fuzz has 1; see package poller
	servers := []*fuzzed{
		newFuzzed(f, block.Geometry{}), newFuzzed(f, block.Geometry{LogicalBlock: 4096}),
		newFuzzed(f, block.Geometry{LogicalBlock: 1024, ChunkSectors: 12, MaxDiscardSectors: 20, MaxZeroesSectors: 6}),
	}
	f.Fuzz(func(t *testing.T, how byte, script []byte) {
		z := servers[int(how>>2)%len(servers)]
		links := []*link{z.link(t, how&1 != 0), z.link(t, how&2 != 0)}
		const size = 12
		for i := 0; len(script) >= size && i < 64; i++ {
			l := links[i%2]
			be := binary.BigEndian
			r := request{
				magic: magicRequest, kind: command(script[0] % 8), flags: uint16(script[1] & 3), cookie: uint64(i),
				offset: uint64(be.Uint32(script[2:]) % (fuzzSize + 1000)), length: be.Uint32(script[6:]) % (fuzzSize + 1000),
			}
			if r.kind == cmdDisc {
				r.kind = cmdRead
			}
			if r.kind == cmdWrite || r.kind == cmdRead || r.kind == cmdFlush || r.kind == cmdTrim {
				r.flags &= cmdFlagFUA
			}
			if r.kind == cmdFlush && script[1]&8 == 0 {
				r.offset, r.length = 0, 0
			}
			out := requestBytes(r)
			var sent []byte
			if r.kind == cmdWrite {
				sent = bytes.Repeat([]byte{byte(i + 1), script[1], 3}, int(r.length)/3+1)[:r.length]
				out = append(out, sent...)
			}
			cut := int(be.Uint16(script[10:]))
			script = script[size:]
			l.send(out, cut)
			data, e, hungUp := l.reply(r)
			if hungUp { // the only way to say that a read failed in part
				if r.kind != cmdRead || l.structured {
					t.Fatalf("hung up on %+v", r)
				}
				_ = unix.Close(l.fd)
				<-l.gone
				links[i%2] = z.link(t, l.structured)
				continue
			}
			l.check(r, sent, data, e)
		}
		links[0].send(append(requestBytes(request{magic: magicRequest, kind: cmdWrite, offset: fuzzSize, length: 1 << 20}), script...), 9)
		for _, l := range links {
			_ = unix.Close(l.fd)
			select {
			case <-l.gone:
			case <-time.After(patience):
				t.Fatal("a connection does not end")
			}
		}
	})
}
