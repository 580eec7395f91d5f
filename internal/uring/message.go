package uring

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Message is the data of OpSendMsg or OpRecvMsg: pieces of memory, in order. From SetSend
// or SetRecv until the completion, it belongs to the kernel, together with the memory of
// its pieces. The message keeps that memory alive. Its own memory is on the Go heap, where
// objects do not move.
type Message struct {
	hdr  unix.Msghdr
	iov  []unix.Iovec // its capacity does not change
	left int          // number of bytes
}

// NewMessage makes a message for up to n pieces, 1..1024.
func NewMessage(n int) *Message { return &Message{iov: make([]unix.Iovec, 0, n)} }

// Reset makes the message empty.
func (m *Message) Reset() { m.iov, m.left = m.iov[:0], 0 }

// Room returns the number of pieces that can be added.
func (m *Message) Room() int { return cap(m.iov) - len(m.iov) }

// Len returns the number of bytes.
func (m *Message) Len() int { return m.left }

// Add appends a piece. An empty piece is ignored. There must be room.
func (m *Message) Add(b []byte) {
	if len(b) == 0 {
		return
	}
	m.iov = m.iov[:len(m.iov)+1]
	v := &m.iov[len(m.iov)-1]
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	m.left += len(b)
}

// Advance removes the first n bytes, which were transferred. n must be at most Len. Room
// does not grow by this.
func (m *Message) Advance(n int) {
	m.left -= n
	first := 0
	for n > 0 {
		v := &m.iov[first]
		k := min(n, int(v.Len))
		n -= k
		if k == int(v.Len) {
			first++
			continue
		}
		v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), k))
		v.SetLen(int(v.Len) - k)
	}
	m.iov = append(m.iov[:0], m.iov[first:]...)
}

// SetSend makes s a sendmsg(2) of the message, without SIGPIPE, on a socket that is not
// O_NONBLOCK. The command may send only a part of the message.
func (s *SQE) SetSend(fd int, m *Message) { s.set(OpSendMsg, fd, m, unix.MSG_NOSIGNAL) }

// SetRecv makes s a recvmsg(2) of at least one byte into the message's pieces, from a
// socket that is not O_NONBLOCK.
func (s *SQE) SetRecv(fd int, m *Message) { s.set(OpRecvMsg, fd, m, 0) }

func (s *SQE) set(op Op, fd int, m *Message, flags uint32) {
	m.hdr = unix.Msghdr{Iov: unsafe.SliceData(m.iov)}
	m.hdr.SetIovlen(len(m.iov))
	s.Opcode, s.FD, s.OpFlags = op, int32(fd), flags
	s.Addr, s.Len = uint64(uintptr(unsafe.Pointer(&m.hdr))), 1
}
