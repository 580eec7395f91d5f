package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// The NBD protocol, as far as the client speaks it (doc/proto.md of the NBD project).
const (
	nbdMagic        = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptionMagic  = 0x49484156454f5054 // "IHAVEOPT"
	nbdReplyMagic   = 0x0003e889045565a9 // of an option
	nbdRequestMagic = 0x25609513
	nbdSimpleMagic  = 0x67446698

	nbdFixedNewstyle = 1 << 0
	nbdNoZeroes      = 1 << 1
	nbdOptGo         = 7
	nbdAck           = 1
	nbdInfoExport    = 0
	nbdMultiConn     = 1 << 8

	nbdRead        = 0
	nbdWrite       = 1
	nbdFlush       = 3
	nbdWriteZeroes = 6
	nbdFUA         = 1 << 0
)

// request is one NBD request and its answer.
type request struct {
	kind, flags    uint16
	offset, length int
	data           []byte // of a write, or room for a read
	cookie         uint64
	begun          time.Time
	done           chan syscall.Errno
}

// client is one NBD connection that is made again for as long as it takes. What was
// not answered is sent again.
type client struct {
	socket, export string

	mu       sync.Mutex
	changed  sync.Cond
	sock     net.Conn // nil without a connection
	cookie   uint64
	waiting  map[uint64]*request // not answered
	unsent   []*request          // in order, on this connection
	connects int
	closed   bool
}

func newClient(socket, export string) *client {
	c := &client{socket: socket, export: export, waiting: map[uint64]*request{}}
	c.changed.L = &c.mu
	go c.receive()
	go c.send()
	return c
}

// do returns when the request was answered.
func (c *client) do(r *request) syscall.Errno {
	r.done = make(chan syscall.Errno, 1)
	r.begun = time.Now()
	c.mu.Lock()
	c.cookie++
	r.cookie = c.cookie
	c.waiting[r.cookie] = r
	if c.sock != nil {
		c.unsent = append(c.unsent, r)
		c.changed.Signal()
	}
	c.mu.Unlock()
	return <-r.done
}

// close ends the client, which has nothing in flight.
func (c *client) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.sock != nil {
		c.sock.Close()
	}
	c.changed.Broadcast()
}

// receive makes connections and takes their replies, until close.
func (c *client) receive() {
	for {
		sock, err := c.connect()
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			if err == nil {
				sock.Close()
			}
			return
		}
		if err != nil {
			c.mu.Unlock()
			time.Sleep(50 * time.Millisecond)
			continue
		}
		c.sock = sock
		c.connects++
		c.unsent = c.unsent[:0]
		for _, r := range c.waiting {
			c.unsent = append(c.unsent, r)
		}
		slices.SortFunc(c.unsent, func(a, b *request) int { return int(a.cookie) - int(b.cookie) })
		c.changed.Signal()
		c.mu.Unlock()
		err = c.replies(sock)
		c.mu.Lock()
		c.sock = nil
		closed := c.closed
		c.mu.Unlock()
		sock.Close()
		if !closed {
			logf("export %s: connection lost: %v", c.export, err)
		}
	}
}

// replies takes replies until the connection ends.
func (c *client) replies(sock net.Conn) error {
	var header [16]byte
	for {
		if _, err := io.ReadFull(sock, header[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(header[:]) != nbdSimpleMagic {
			fatalf("export %s: no simple reply: %x", c.export, header)
		}
		errno, cookie := syscall.Errno(binary.BigEndian.Uint32(header[4:])), binary.BigEndian.Uint64(header[8:])
		c.mu.Lock()
		r := c.waiting[cookie]
		c.mu.Unlock()
		if r == nil {
			fatalf("export %s: reply to cookie %d, which waits for none", c.export, cookie)
		}
		if r.kind == nbdRead && errno == 0 {
			if _, err := io.ReadFull(sock, r.data); err != nil {
				return err
			}
		}
		c.mu.Lock()
		delete(c.waiting, cookie)
		c.mu.Unlock()
		r.done <- errno
	}
}

// send sends requests, until close.
func (c *client) send() {
	var header [28]byte
	for {
		c.mu.Lock()
		for !c.closed && (c.sock == nil || len(c.unsent) == 0) {
			c.changed.Wait()
		}
		if c.closed {
			c.mu.Unlock()
			return
		}
		sock, r := c.sock, c.unsent[0]
		c.unsent = c.unsent[1:]
		c.mu.Unlock()
		binary.BigEndian.PutUint32(header[:], nbdRequestMagic)
		binary.BigEndian.PutUint16(header[4:], r.flags)
		binary.BigEndian.PutUint16(header[6:], r.kind)
		binary.BigEndian.PutUint64(header[8:], r.cookie)
		binary.BigEndian.PutUint64(header[16:], uint64(r.offset))
		binary.BigEndian.PutUint32(header[24:], uint32(r.length))
		message := net.Buffers{header[:]}
		if r.kind == nbdWrite {
			message = append(message, r.data)
		}
		if _, err := message.WriteTo(sock); err != nil {
			sock.Close() // receive makes another
		}
	}
}

// connect negotiates one connection.
func (c *client) connect() (net.Conn, error) {
	sock, err := net.Dial("unix", c.socket)
	if err != nil {
		return nil, err
	}
	err = errors.Join(sock.SetDeadline(time.Now().Add(30*time.Second)), c.negotiate(sock), sock.SetDeadline(time.Time{}))
	if err != nil {
		sock.Close()
		return nil, err
	}
	return sock, nil
}

func (c *client) negotiate(sock net.Conn) error {
	var hello [18]byte
	if _, err := io.ReadFull(sock, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != nbdMagic || binary.BigEndian.Uint64(hello[8:]) != nbdOptionMagic {
		return fmt.Errorf("no NBD server: %x", hello)
	}
	b := binary.BigEndian.AppendUint32(nil, nbdFixedNewstyle|nbdNoZeroes)
	b = binary.BigEndian.AppendUint64(b, nbdOptionMagic)
	b = binary.BigEndian.AppendUint32(b, nbdOptGo)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(c.export)+2))
	b = binary.BigEndian.AppendUint32(b, uint32(len(c.export)))
	b = append(b, c.export...)
	b = binary.BigEndian.AppendUint16(b, 0)
	if _, err := sock.Write(b); err != nil {
		return err
	}
	for {
		var header [20]byte
		if _, err := io.ReadFull(sock, header[:]); err != nil {
			return err
		}
		kind := binary.BigEndian.Uint32(header[12:])
		data := make([]byte, binary.BigEndian.Uint32(header[16:]))
		if _, err := io.ReadFull(sock, data); err != nil {
			return err
		}
		switch {
		case binary.BigEndian.Uint64(header[:]) != nbdReplyMagic:
			return fmt.Errorf("no reply to an option: %x", header)
		case kind == nbdAck:
			return nil
		case kind >= 1<<31:
			return fmt.Errorf("export %q: error %#x: %q", c.export, kind, data)
		case len(data) == 12 && binary.BigEndian.Uint16(data) == nbdInfoExport && binary.BigEndian.Uint16(data[10:])&nbdMultiConn == 0:
			return fmt.Errorf("export %q: a flush covers one connection only", c.export)
		}
	}
}
