package uring

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Message is what OpSendMsg sends, or OpRecvMsg fills: pieces of memory, in order.
// From SetSend or SetRecv to the completion it is the kernel's, and so is the memory
// of its pieces, which the message keeps alive. It does not move.
type Message struct {
	hdr  unix.Msghdr
	iov  []unix.Iovec // of fixed capacity
	left int          // bytes
}

// NewMessage makes a message for up to n pieces, 1..1024.
func NewMessage(n int) *Message { return &Message{iov: make([]unix.Iovec, 0, n)} }

// Reset makes the message empty.
func (m *Message) Reset() { m.iov, m.left = m.iov[:0], 0 }

// Room is how many pieces can be added.
func (m *Message) Room() int { return cap(m.iov) - len(m.iov) }

// Len is the number of bytes.
func (m *Message) Len() int { return m.left }

// Add appends a piece; an empty one is left out. There must be room.
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

// Advance drops the first n bytes, which were transferred, n ≤ Len. The pieces that
// are left stay where they are, so there is no more room than before.
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

// SetSend makes s a sendmsg(2) of the message on a socket that is not O_NONBLOCK,
// without SIGPIPE. It may send less.
func (s *SQE) SetSend(fd int, m *Message) { s.set(OpSendMsg, fd, m, unix.MSG_NOSIGNAL) }

// SetRecv makes s a recvmsg(2) of at least a byte into the message's pieces, from a
// socket that is not O_NONBLOCK.
func (s *SQE) SetRecv(fd int, m *Message) { s.set(OpRecvMsg, fd, m, 0) }

func (s *SQE) set(op Op, fd int, m *Message, flags uint32) {
	m.hdr = unix.Msghdr{Iov: unsafe.SliceData(m.iov)}
	m.hdr.SetIovlen(len(m.iov))
	s.Opcode, s.FD, s.OpFlags = op, int32(fd), flags
	s.Addr, s.Len = uint64(uintptr(unsafe.Pointer(&m.hdr))), 1
}
