package vhost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A session moves from one server to another without the front end: the messages that set it up are
// repeated to the other server, with the descriptors that they brought, and without answers. The
// connection of the front end goes with them.

const (
	// frontEnd is the first message of a session that is handed over. Its payload is the path of
	// the socket, its descriptor the connection of the front end.
	frontEnd request = 1<<31 | iota
	// complete is the last one.
	complete
)

// Session is the session of a front end on its way from one server to another.
type Session struct {
	socket string
	conn   *net.UnixConn
	setup  []*message
}

// Receive reads a session that the other end of a connection hands over (Server.HandOver). It
// fails if the other end closes the connection before the session is complete, or takes longer than
// ten seconds.
func Receive(from *net.UnixConn) (*Session, error) {
	x := &Session{}
	if err := x.receive(from); err != nil {
		return nil, errors.Join(fmt.Errorf("receive vhost-user-blk session: %w", err), x.Close())
	}
	return x, nil
}

func (x *Session) receive(from *net.UnixConn) error {
	if err := from.SetReadDeadline(time.Now().Add(replyTime)); err != nil {
		return err
	}
	for {
		m, err := readMessage(from)
		if err != nil {
			return err
		}
		switch {
		case m.request == complete && x.conn != nil:
			return nil
		case m.request != frontEnd:
			m.handed = true
			x.setup = append(x.setup, m)
			continue
		}
		fd, err := m.takeFD()
		m.close()
		if err != nil {
			return err
		}
		x.socket = string(m.payload)
		if x.conn, err = unixConn(fd); err != nil {
			return err
		}
	}
}

// Socket returns the path of the socket to which the front end has connected.
func (x *Session) Socket() string { return x.socket }

// Close hangs up the front end, which connects again. It is for sessions that no server resumes.
func (x *Session) Close() error {
	for _, m := range x.setup {
		m.close()
	}
	if x.conn == nil {
		return nil
	}
	return x.conn.Close()
}

// Resume serves the front end of a session, as if it had connected to a listener of the server.
// The session belongs to the server then. It ends if the server cannot serve it.
func (s *Server) Resume(x *Session) { s.begin(newSession(s, x.conn), x.setup) }

// repeat handles the messages that an earlier server has handed over.
func (n *session) repeat(setup []*message) error {
	for i, m := range setup {
		err := n.handle(m)
		m.close()
		if err != nil {
			for _, rest := range setup[i:] {
				rest.close()
			}
			return fmt.Errorf("%v, handed over: %w", m.request, err)
		}
	}
	return nil
}

// pause makes the reader end before the next message.
func (n *session) pause() error {
	n.pausing.Store(true)
	return n.conn.SetReadDeadline(time.Unix(1, 0))
}

// send hands the session over. No loop uses it any more.
func (n *session) send(to *net.UnixConn) error {
	if err := to.SetWriteDeadline(time.Now().Add(replyTime)); err != nil {
		return err
	}
	raw, err := n.conn.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		sent = sendMessage(to, &message{request: frontEnd, payload: []byte(n.conn.LocalAddr().String()), fds: []int{int(fd)}})
	})
	if err := errors.Join(err, sent); err != nil {
		return err
	}
	for _, m := range n.setup() {
		if err := sendMessage(to, m); err != nil {
			return err
		}
	}
	return sendMessage(to, &message{request: complete})
}

func sendMessage(to *net.UnixConn, m *message) error {
	m.flags |= flagVersion
	var oob []byte
	if len(m.fds) > 0 {
		oob = unix.UnixRights(m.fds...)
	}
	b := m.encode()
	k, _, err := to.WriteMsgUnix(b, oob, nil)
	if err == nil && k < len(b) {
		_, err = to.Write(b[k:])
	}
	if err != nil {
		return fmt.Errorf("hand over %v: %w", m.request, err)
	}
	return nil
}

// setup returns the messages that set up the session as it is. Their descriptors stay those of the
// session.
func (n *session) setup() []*message {
	all := []*message{
		{request: setProtocolFeatures, payload: words(n.protocol)},
		{request: setFeatures, payload: words(n.features)},
	}
	if n.backend >= 0 {
		all = append(all, &message{request: setBackendReqFD, fds: []int{n.backend}})
	}
	for _, r := range n.regions {
		all = append(all, &message{request: addMemReg, payload: append(words(0), r.encode()...), fds: []int{r.file}})
	}
	if l := n.log; l != nil {
		all = append(all, &message{request: setLogBase, payload: words(uint64(len(l.raw)), l.offset), fds: []int{l.file}})
	}
	if a := n.inflight; a != nil {
		m := &message{request: setInflightFD, payload: make([]byte, inflightDescSize), fds: []int{a.file}}
		a.desc.encode(m.payload)
		all = append(all, m)
	}
	for i := range n.rings {
		all = append(all, n.rings[i].setup(uint32(i))...)
	}
	return all
}

// setup returns the messages that set up a ring. A ring begins to be served with the last of them.
func (f *frontRing) setup(index uint32) (all []*message) {
	base := f.base
	if f.served != nil {
		base = f.served.lastAvail
	}
	tell := func(r request, v uint64) { all = append(all, &message{request: r, payload: words(v)}) }
	if f.num != 0 {
		tell(setVringNum, halves(index, uint32(f.num)))
	}
	if base != 0 {
		tell(setVringBase, halves(index, uint32(base)))
	}
	if f.call >= 0 {
		all = append(all, eventfdMessage(setVringCall, index, f.call))
	}
	if f.located {
		all = append(all, &message{request: setVringAddr, payload: f.addr.encode(index)})
	}
	if f.enabled {
		tell(setVringEnable, halves(index, 1))
	}
	if f.kicked {
		all = append(all, eventfdMessage(setVringKick, index, f.kick))
	}
	return all
}

// eventfdMessage returns SET_VRING_KICK or SET_VRING_CALL; see ringFD.
func eventfdMessage(r request, index uint32, fd int) *message {
	m := &message{request: r, payload: words(uint64(index))}
	if fd < 0 {
		m.payload = words(uint64(index) | noFD)
	} else {
		m.fds = []int{fd}
	}
	return m
}

// unixConn makes a connection of a descriptor, which it closes.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "front end")
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%T is not the connection of a front end", c), c.Close())
	}
	return u, nil
}
