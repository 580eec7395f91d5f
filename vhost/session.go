package vhost

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// replyTime is the time within which a front end must read a reply.
const replyTime = 10 * time.Second

var (
	errGone   = errors.New("memory of the front end is gone")
	errHungUp = errors.New("the front end hung up")
	errHalf   = errors.New("a message was not sent completely in time")
	errPaused = errors.New("another server takes the front end over")
)

// session is the connection of a front end, and what it has set up. Its goroutine handles
// the messages in order. Loops see it only in fail and maps.
type session struct {
	server *Server
	conn   *net.UnixConn
	peer   string
	ended  chan struct{} // closed when nothing of the session is left
	failed chan struct{} // closed by fail
	once   sync.Once
	err    error         // why it failed; written before failed is closed
	hungUp chan struct{} // closed when nothing can be read any more
	read   error         // why; written before hungUp is closed

	leaving   chan *net.UnixConn // has the connection to the server that takes the session over
	successor *net.UnixConn      // that connection
	pausing   atomic.Bool        // no more messages are read

	features, protocol uint64
	regions            []*region
	log                *dirtyLog
	inflight           *inflightArea
	recorded           atomic.Bool // inflight is not nil
	memory             *memory
	rings              [maxRings]frontRing

	mappings sync.Mutex // guards mapped
	mapped   [][]byte   // mappings of the front end's files

	channel sync.Mutex // guards backend
	backend int        // socket of the back-end channel, or -1
}

// frontRing is a ring as the front end describes it.
type frontRing struct {
	num     uint16
	base    uint16
	located bool
	addr    vringAddr
	kick    int  // eventfd, or -1
	kicked  bool // SET_VRING_KICK has come
	call    int  // eventfd, or -1
	enabled bool
	served  *vring // nil: it is not served
}

func newSession(s *Server, c *net.UnixConn) *session {
	n := &session{
		server: s, conn: c, peer: describePeer(c), backend: -1,
		ended: make(chan struct{}), failed: make(chan struct{}), hungUp: make(chan struct{}), leaving: make(chan *net.UnixConn, 1),
	}
	for i := range n.rings {
		n.rings[i].kick, n.rings[i].call = -1, -1
	}
	return n
}

// describePeer names the process at the other end.
func describePeer(c *net.UnixConn) string {
	name := "unknown process"
	raw, err := c.SyscallConn()
	if err != nil {
		return name
	}
	_ = raw.Control(func(fd uintptr) { // an error leaves the name
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = fmt.Sprintf("process %d of user %d", cred.Pid, cred.Uid)
		}
	})
	return name
}

// hasGone reports whether the front end has hung up, or its session has failed.
func (n *session) hasGone() bool {
	select {
	case <-n.failed:
		return true
	case <-n.hungUp:
		return true
	default:
	}
	raw, err := n.conn.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, _ = unix.Poll(p, 0) // an error leaves no event
		gone = p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}

// fail ends the session. It does not block. Any goroutine may call it.
func (n *session) fail(err error) {
	n.once.Do(func() {
		n.err = err
		close(n.failed)
	})
}

// maps reports whether an address is within memory of the front end. Any goroutine may
// call it.
func (n *session) maps(addr uintptr) bool {
	n.mappings.Lock()
	defer n.mappings.Unlock()
	for _, m := range n.mapped {
		if contains(m, addr) {
			return true
		}
	}
	return false
}

func (n *session) addMapping(m []byte) {
	n.mappings.Lock()
	defer n.mappings.Unlock()
	n.mapped = append(n.mapped, m)
}

func (n *session) removeMapping(m []byte) {
	n.mappings.Lock()
	defer n.mappings.Unlock()
	for i := range n.mapped {
		if &n.mapped[i][0] == &m[0] {
			n.mapped = append(n.mapped[:i], n.mapped[i+1:]...)
			return
		}
	}
}

// run serves the front end until it hangs up, the session fails, or another server has it. setup
// is what an earlier server was told. run returns nil if the front end has hung up in order, or was
// handed over.
func (n *session) run(setup []*message) error {
	messages := make(chan *message)
	var reader sync.WaitGroup
	err := n.repeat(setup)
	if err == nil {
		reader.Go(func() { n.receive(messages) })
		err = n.serve(messages)
	}
	if errors.Is(err, errPaused) {
		err = n.drainRest()
	}
	n.fail(err)
	n.leave()
	if errors.Is(err, errPaused) {
		if err = n.send(n.successor); err == nil {
			err = io.EOF
		}
	}
	_ = n.conn.Close() // ends the reader
	reader.Wait()
	n.release()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// serve handles messages, and returns the reason of the end.
func (n *session) serve(messages <-chan *message) error {
	for {
		select {
		case m := <-messages:
			err := n.handle(m)
			m.close()
			if err != nil {
				return fmt.Errorf("%v: %w", m.request, err)
			}
		case <-n.failed:
			return n.err
		case n.successor = <-n.leaving:
			if err := n.pause(); err != nil {
				return err
			}
		case <-n.hungUp:
			select {
			case <-n.failed: // the reader has ended for the same reason
				return n.err
			default:
				return n.read
			}
		}
	}
}

// receive reads messages until the connection ends.
func (n *session) receive(messages chan<- *message) {
	defer close(n.hungUp)
	for {
		var m *message
		err := errPaused
		if !n.pausing.Load() {
			m, err = readMessage(n.conn)
		}
		if err != nil {
			if n.pausing.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				err = errPaused
			}
			n.read = err
			return
		}
		select {
		case messages <- m:
		case <-n.failed:
			m.close()
			return
		}
	}
}

// readMessage reads a message and its file descriptors.
func readMessage(c *net.UnixConn) (*message, error) {
	var header [headerSize]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	k, oobn, flags, _, err := c.ReadMsgUnix(header[:], oob)
	m := &message{}
	if oobn > 0 {
		m.fds, err = parseFDs(oob[:oobn], err)
	}
	switch {
	case err != nil:
		m.close()
		return nil, err
	case k == 0:
		return nil, io.EOF
	case flags&unix.MSG_CTRUNC != 0:
		m.close()
		return nil, fmt.Errorf("a message has more than %d file descriptors", maxFDs)
	}
	rest := &restReader{conn: c}
	if _, err := io.ReadFull(rest, header[k:]); err != nil {
		m.close()
		return nil, cutOff(err)
	}
	le := binary.LittleEndian
	m.request, m.flags = request(le.Uint32(header[:])), le.Uint32(header[4:])
	size := le.Uint32(header[8:])
	switch {
	case m.flags&flagVersionMask != flagVersion || m.flags&flagReply != 0:
		err = fmt.Errorf("%v has flags %#x, want version 1 and no reply", m.request, m.flags)
	case size > maxPayload:
		err = fmt.Errorf("%v has %d bytes, want up to %d", m.request, size, maxPayload)
	default:
		m.payload = make([]byte, size)
		_, err = io.ReadFull(rest, m.payload)
		err = cutOff(err)
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// restReader reads the rest of a message that has begun. If a deadline passes meanwhile, the sender has
// replyTime for it.
type restReader struct {
	conn     *net.UnixConn
	extended bool
}

func (r *restReader) Read(p []byte) (int, error) {
	if r.extended {
		return r.readExtended(p)
	}
	k, err := r.conn.Read(p)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return k, err
	}
	r.extended = true
	if err := r.conn.SetReadDeadline(time.Now().Add(replyTime)); err != nil {
		return k, err
	}
	return r.readExtended(p)
}

// readExtended reads until the extended deadline. Its error is errHalf then, not that of a deadline: bytes of
// the message are read, so nobody else can read the rest, and the session must not be handed over.
func (r *restReader) readExtended(p []byte) (int, error) {
	k, err := r.conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errHalf
	}
	return k, err
}

// cutOff makes the end of the connection within a message an error.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseFDs returns the file descriptors of a control message.
func parseFDs(oob []byte, err error) ([]int, error) {
	all, perr := unix.ParseSocketControlMessage(oob)
	err = errors.Join(err, perr)
	var fds []int
	for i := range all {
		got, perr := unix.ParseUnixRights(&all[i])
		if perr == nil {
			fds = append(fds, got...)
		}
	}
	return fds, err
}

// close closes the descriptors that nobody has taken.
func (m *message) close() {
	for i, fd := range m.fds {
		if fd >= 0 {
			_ = unix.Close(fd)
			m.fds[i] = -1
		}
	}
}

// reply answers a message.
func (n *session) reply(m *message, payload []byte, fds ...int) error {
	if m.handed {
		return nil
	}
	b := (&message{request: m.request, flags: flagVersion | flagReply, payload: payload}).encode()
	if err := n.conn.SetWriteDeadline(time.Now().Add(replyTime)); err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	k, _, err := n.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && k < len(b) {
		_, err = n.conn.Write(b[k:])
	}
	if err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	return nil
}

func (n *session) replyU64(m *message, v uint64) error {
	return n.reply(m, binary.LittleEndian.AppendUint64(nil, v))
}

// handle handles a message. An error ends the session, because what the front end assumes
// from then on is not known.
func (n *session) handle(m *message) error {
	answered, err := n.dispatch(m)
	if answered {
		return err
	}
	if m.needsReply() && n.protocol&protoReplyAck != 0 {
		code := uint64(0)
		if err != nil {
			code = 1
		}
		return errors.Join(err, n.replyU64(m, code))
	}
	return err
}

// dispatch does what a message asks for. answered is true if the message was answered.
func (n *session) dispatch(m *message) (answered bool, err error) {
	switch m.request {
	case setOwner, resetOwner, setLogFD, setVringErr: // nothing to do
		return false, nil
	case getFeatures:
		return true, n.replyU64(m, features(n.server.cfg.Device.Geometry()))
	case setFeatures:
		return false, n.setFeatures(m)
	case getProtocolFeatures:
		return true, n.replyU64(m, protocolFeatures)
	case setProtocolFeatures:
		return false, n.setProtocolFeatures(m)
	case getQueueNum:
		return true, n.replyU64(m, maxRings)
	case getMaxMemSlots:
		return true, n.replyU64(m, maxSlots)
	case setMemTable:
		return false, n.setMemTable(m)
	case addMemReg:
		return false, n.addRegion(m)
	case remMemReg:
		return false, n.removeRegion(m)
	case setLogBase:
		return n.setLogBase(m)
	case getConfig:
		return true, n.getConfig(m)
	case setConfig:
		n.server.events.Warn("vhost-user-blk front end wants to change the cache mode, which was not offered", "front_end", n.peer)
		return true, n.refuse(m)
	case getInflightFD:
		return true, n.getInflight(m)
	case setInflightFD:
		return false, n.setInflight(m)
	case setBackendReqFD:
		return false, n.setBackend(m)
	case resetDevice:
		return false, n.resetDevice()
	default:
		return n.dispatchRing(m)
	}
}

// dispatchRing is dispatch for messages about a ring.
func (n *session) dispatchRing(m *message) (answered bool, err error) {
	switch m.request {
	case setVringNum:
		return false, n.setNum(m)
	case setVringAddr:
		return false, n.setAddr(m)
	case setVringBase:
		return false, n.setBase(m)
	case getVringBase:
		return true, n.getBase(m)
	case setVringKick:
		return false, n.setKick(m)
	case setVringCall:
		return false, n.setCall(m)
	case setVringEnable:
		return false, n.setEnable(m)
	}
	return false, errors.New("the message was not negotiated")
}

// refuse answers a message that needs a reply with an error, and continues.
func (n *session) refuse(m *message) error {
	if m.needsReply() && n.protocol&protoReplyAck != 0 {
		return n.replyU64(m, 1)
	}
	return nil
}

func (n *session) setFeatures(m *message) error {
	f, err := m.u64()
	if err != nil {
		return err
	}
	if unknown := f &^ everOffered; unknown != 0 {
		return fmt.Errorf("features %#x were not offered", unknown)
	}
	n.features = f
	fua := f&featFlush == 0
	if err := n.onAll(func(w *worker) error { w.writeFUA = fua; return nil }); err != nil {
		return err
	}
	if n.memory != nil {
		if err := n.pushMemory(); err != nil {
			return err
		}
	}
	return n.updateAll()
}

func (n *session) setProtocolFeatures(m *message) error {
	f, err := m.u64()
	if err != nil {
		return err
	}
	if unknown := f &^ protocolFeatures; unknown != 0 {
		return fmt.Errorf("protocol features %#x were not offered", unknown)
	}
	n.protocol = f
	return nil
}

// getConfig answers with a part of the configuration space, or with nothing if there is no
// such part.
func (n *session) getConfig(m *message) error {
	if len(m.payload) < configHeader {
		return fmt.Errorf("payload of %d bytes, want at least %d", len(m.payload), configHeader)
	}
	le := binary.LittleEndian
	offset, size := le.Uint32(m.payload), le.Uint32(m.payload[4:])
	if offset > maxConfigSize || size > maxConfigSize-offset || int(size) != len(m.payload)-configHeader {
		return n.reply(m, nil)
	}
	space := configSpace(n.server.cfg.Device.Geometry(), maxRings)
	copy(m.payload[configHeader:], space[offset:])
	return n.reply(m, m.payload)
}

func (n *session) getInflight(m *message) error {
	d, err := decodeInflight(m.payload)
	if err != nil {
		return err
	}
	fd, d, err := newInflight(d.queues, d.ringSize)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	d.encode(m.payload)
	return n.reply(m, m.payload, fd)
}

func (n *session) setInflight(m *message) error {
	d, err := decodeInflight(m.payload)
	if err != nil {
		return err
	}
	for i := range n.rings {
		if n.rings[i].served != nil {
			return fmt.Errorf("ring %d is being served", i)
		}
	}
	if len(m.fds) != 1 {
		return fmt.Errorf("%d file descriptors, want 1", len(m.fds))
	}
	a, err := mapInflight(m.fds[0], d)
	if err != nil {
		return err
	}
	old := n.inflight
	n.inflight = a
	n.recorded.Store(true)
	n.addMapping(a.raw)
	if old == nil {
		return nil
	}
	n.removeMapping(old.raw)
	return old.unmap()
}

// setBackend takes the socket on which the front end hears of changes.
func (n *session) setBackend(m *message) error {
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return errors.Join(errors.New("the file is not a socket"), unix.Close(fd))
	}
	n.channel.Lock()
	defer n.channel.Unlock()
	old := n.backend
	n.backend = fd
	closeFD(old)
	return nil
}

// notify tells the front end that the configuration space has changed.
func (n *session) notify() error {
	n.channel.Lock()
	defer n.channel.Unlock()
	if n.backend < 0 {
		return nil
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, backendConfigChange)
	b = le.AppendUint32(b, flagVersion)
	b = le.AppendUint32(b, 0)
	if err := unix.Sendto(n.backend, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil); err != nil {
		return fmt.Errorf("tell the front end about a change: %w", err)
	}
	return nil
}

// on runs fn on the loop of a ring, and waits for it.
func (n *session) on(ring int, fn func(*worker) error) error {
	i := ring % len(n.server.workers)
	w := n.server.workers[i]
	var err error
	lost := n.server.cfg.Loops[i].Call(func() {
		if w.session != n {
			err = errGone // it has failed on the loop
			return
		}
		err = w.guarded(func() error { return fn(w) })
	})
	if errors.Is(err, errGone) {
		<-n.failed
		return n.err
	}
	return errors.Join(err, lost)
}

// onAll runs fn on each loop. The first call makes the session that of the worker.
func (n *session) onAll(fn func(*worker) error) error {
	for i, w := range n.server.workers {
		if lost := n.server.cfg.Loops[i].Call(func() {
			select {
			case <-n.failed:
			default:
				w.adopt(n)
			}
		}); lost != nil {
			return lost
		}
		if err := n.on(i, fn); err != nil {
			return err
		}
	}
	return nil
}

// drain waits until no request is in flight, and none is taken any more.
func (n *session) drain(ctx context.Context) error {
	for i, w := range n.server.workers {
		var drained chan struct{}
		_ = n.server.cfg.Loops[i].Call(func() { // a loop that has ended has no requests
			if w.session != n {
				return
			}
			if w.drained == nil {
				w.drained = make(chan struct{})
			}
			drained = w.drained
			if w.running == 0 {
				w.endDrain()
			}
		})
		if drained == nil {
			continue
		}
		select {
		case <-drained:
		case <-n.failed:
			return n.err
		case <-ctx.Done():
			return fmt.Errorf("wait for requests in flight: %w", context.Cause(ctx))
		}
	}
	return nil
}

// drainRest waits for requests of rings that messages have started since drain. No message is read any
// more. The error is errPaused if the session can be handed over.
func (n *session) drainRest() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := n.drain(ctx); err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	return errPaused
}

// leave ends the session on all loops. From then on nobody touches the guest's memory, the back
// end included. The front end, which is still connected, may believe that the device has stopped
// only then, because the guest may use its buffers for something else.
func (n *session) leave() {
	for i, w := range n.server.workers {
		_ = n.server.cfg.Loops[i].Call(func() { w.leave(n) }) // a loop that has ended does not touch it
	}
	for _, r := range n.regions {
		n.warn(r.takeBack())
	}
}

// release frees what the front end has set up.
func (n *session) release() {
	for i := range n.rings {
		n.endRing(&n.rings[i], i)
		closeFD(n.rings[i].kick)
		closeFD(n.rings[i].call)
	}
	n.warn(n.unmapAll(n.regions))
	if n.log != nil {
		n.warn(n.log.unmap())
	}
	if n.inflight != nil {
		n.warn(n.inflight.unmap())
	}
	n.channel.Lock()
	defer n.channel.Unlock()
	closeFD(n.backend)
	n.backend = -1
}

func (n *session) warn(err error) {
	if err != nil {
		n.server.cfg.Log.Warn("vhost-user-blk session leaves something behind", "error", err)
	}
}

func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// isEventfd reports whether a file is an eventfd.
func isEventfd(fd int) bool {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return err == nil && name == "anon_inode:[eventfd]"
}
