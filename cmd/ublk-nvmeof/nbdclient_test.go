package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// nbdClient is as much of a client as the tests need: one request at a time
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
type nbdClient struct{ conn net.Conn }

const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3
)

// dialNBD chooses an export.
func dialNBD(network, address, export string) (*nbdClient, error) {
	conn, err := net.DialTimeout(network, address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := &nbdClient{conn}
	if err := c.choose(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("choose export %q: %w", export, err)
	}
	return c, nil
}

func (c *nbdClient) choose(export string) error {
	_ = c.conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(c.conn, make([]byte, 18)); err != nil {
		return err
	}
	// Fixed newstyle without zeroes, then NBD_OPT_EXPORT_NAME, which has no error answer.
	hello := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 3}, 0x49484156)
	hello = binary.BigEndian.AppendUint32(hello, 0x454f5054)
	hello = binary.BigEndian.AppendUint32(hello, 1)
	hello = append(binary.BigEndian.AppendUint32(hello, uint32(len(export))), export...)
	if _, err := c.conn.Write(hello); err != nil {
		return err
	}
	_, err := io.ReadFull(c.conn, make([]byte, 10)) // size and flags
	return err
}

// do sends a request and waits for its reply, for at most limit.
func (c *nbdClient) do(cmd uint16, offset uint64, data []byte, limit time.Duration) error {
	_ = c.conn.SetDeadline(time.Now().Add(limit))
	req := binary.BigEndian.AppendUint32(nil, 0x25609513)
	req = binary.BigEndian.AppendUint16(req, 0)
	req = binary.BigEndian.AppendUint16(req, cmd)
	req = binary.BigEndian.AppendUint64(req, 1)
	req = binary.BigEndian.AppendUint64(req, offset)
	req = binary.BigEndian.AppendUint32(req, uint32(len(data)))
	if cmd == nbdWrite {
		req = append(req, data...)
	}
	if _, err := c.conn.Write(req); err != nil {
		return err
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(c.conn, reply); err != nil {
		return err
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
		return unix.Errno(e)
	}
	if cmd == nbdRead {
		_, err := io.ReadFull(c.conn, data)
		return err
	}
	return nil
}

const nbdPatience = 60 * time.Second

// block is a block that begins with a text.
func block(text string) []byte {
	b := make([]byte, 4096)
	copy(b, text)
	return b
}

// write writes a block with a text, and flushes.
func (c *nbdClient) write(text string) error {
	if err := c.do(nbdWrite, 0, block(text), nbdPatience); err != nil {
		return fmt.Errorf("write %q: %w", text, err)
	}
	if err := c.do(nbdFlush, 0, nil, nbdPatience); err != nil {
		return fmt.Errorf("flush %q: %w", text, err)
	}
	return nil
}

// read reads what the first block begins with.
func (c *nbdClient) read(n int) (string, error) {
	b := make([]byte, 4096)
	err := c.do(nbdRead, 0, b, nbdPatience)
	return string(b[:n]), err
}

func (c *nbdClient) close() { c.conn.Close() }
