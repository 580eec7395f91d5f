package initiator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Credentials are the keys for in-band authentication (DH-HMAC-CHAP).
type Credentials struct {
	Host       *auth.Key // what this host proves to have; nil: it cannot authenticate
	Controller *auth.Key // what the controller must prove to have; nil: nothing. It needs Host
}

// Errors of Reauthenticate with keys that later associations use all the same.
var (
	// ErrKeysAccepted means that some queues have accepted the keys, and another one has not.
	ErrKeysAccepted = errors.New("the keys are in use, but not all queues have accepted them")
	// ErrKeysUntried means that no path was connected.
	ErrKeysUntried = errors.New("the keys will be used for the next connection")
)

// Errors of an authentication that does not begin.
var (
	ErrNoKey      = errors.New("the target requires authentication, and there is no host key")
	ErrNotMutual  = errors.New("the target does not ask for authentication, so it does not prove that it has the controller key")
	errNoChannel  = errors.New("the target requires a secure channel, which RDMA does not have")
	errNotAgain   = errors.New("the target did not ask for authentication, so there is nothing to repeat")
	errAuthStatus = errors.New("the target requires authentication in the middle of the connection")
)

// AuthError is a failed authentication of a queue. It is also the error if the connection
// is lost, or the target falls silent, in the middle of one. The cause is an *auth.Error,
// ErrNoKey, ErrNotMutual, an nvme.Status, or why the connection was lost.
type AuthError struct {
	Queue uint16
	Err   error
}

func (e *AuthError) Error() string {
	return fmt.Sprintf("authentication of queue %d: %v", e.Queue, e.Err)
}
func (e *AuthError) Unwrap() error { return e.Err }

// authPort runs an Authentication Send with data from in, or a Receive with data for out.
// A status other than success is an error.
type authPort func(ctx context.Context, cmd *nvme.Command, in, out []byte) error

// authenticate does what the target asked for in its answer to the Connect of a queue.
// method says how the queue was authenticated; it is empty if the target did not ask.
func (c *Controller) authenticate(ctx context.Context, qid uint16, asked nvme.ConnectResult, port authPort) (method string, err error) {
	keys := c.sub.credentials()
	switch {
	case asked.SecureChannelRequired():
		return "", &AuthError{qid, errNoChannel}
	case asked.AuthRequired():
		return c.prove(ctx, qid, keys, port)
	case qid == 0 && keys.Controller != nil && !c.cfg.Discovery:
		// Targets may ask on the admin queue only, and not for discovery.
		return "", &AuthError{qid, ErrNotMutual}
	}
	return "", nil
}

func (s *Subsystem) credentials() Credentials {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys
}

func (s *Subsystem) setCredentials(keys Credentials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = keys
}

// prove authenticates a queue. No other run may be in progress on it. The arithmetic takes
// up to a tenth of a second, so it must not run on a loop.
func (c *Controller) prove(ctx context.Context, qid uint16, keys Credentials, port authPort) (method string, err error) {
	began := time.Now()
	if keys.Host == nil {
		return "", &AuthError{qid, ErrNoKey}
	}
	host, err := auth.NewHost(auth.HostConfig{
		HostNQN: c.cfg.HostNQN, SubNQN: c.cfg.SubNQN, Key: keys.Host, ControllerKey: keys.Controller,
		Transaction: uint16(c.transactions.Add(1)),
	})
	if err == nil {
		err = converse(ctx, host, port)
	}
	if err != nil {
		return "", &AuthError{qid, err}
	}
	hash, group := host.Method()
	method = fmt.Sprintf("%v, %v, %s", hash, group, ways(keys))
	c.cfg.Log.Debug("authenticated", "queue", qid, "method", method, "after", time.Since(began).Round(time.Microsecond))
	return method, nil
}

func ways(keys Credentials) string {
	if keys.Controller != nil {
		return "two-way"
	}
	return "one-way"
}

// converse passes the messages of a run.
func converse(ctx context.Context, host *auth.Host, port authPort) error {
	send := func(msg []byte) error {
		var cmd nvme.Command
		cmd.SetAuthSend(uint32(len(msg)))
		return port(ctx, &cmd, msg, nil)
	}
	var room [auth.MaxMessage]byte
	for msg := host.Negotiate(); msg != nil; {
		if err := send(msg); err != nil {
			return refusalOf(host, err)
		}
		if host.Authenticated() {
			return nil
		}
		var cmd nvme.Command
		cmd.SetAuthReceive(auth.MaxMessage)
		if err := port(ctx, &cmd, nil, room[:]); err != nil {
			return refusalOf(host, err)
		}
		out, err := host.Next(room[:])
		if err != nil {
			if out != nil {
				_ = send(out) // the target may have left; err is what matters
			}
			return err
		}
		msg = out
	}
	return nil
}

// refusalOf explains why a command of a run failed. Targets often end the connection
// before the host can read why they refuse it (nvmet does). Silence says nothing about keys.
func refusalOf(host *auth.Host, err error) error {
	if host.Replied() && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the target ended it after the reply of this host, most likely because it has another host key, or no controller key: %w", err)
	}
	return fmt.Errorf("it was not completed: %w", err)
}

// authPort is the port of the admin queue.
func (a *admin) authPort(ctx context.Context, cmd *nvme.Command, in, out []byte) error {
	_, err := a.exec(ctx, cmd, in, out)
	return err
}

// authPort is the port of an I/O queue that no lane uses yet. It uses a buffer of the admin
// queue.
func (conn *connection) authPort(a *admin, buffer int) authPort {
	return func(ctx context.Context, cmd *nvme.Command, in, out []byte) error {
		buf := a.mr.Bytes()[buffer*adminBuffer:][:max(len(in), len(out))]
		clear(buf) // the controller may fill less of it
		copy(buf, in)
		cmd.SetKeyedSGL(a.mr.Addr()+uint64(buffer*adminBuffer), uint32(len(buf)), a.mr.RKey(), false)
		done, err := conn.call(ctx, cmd)
		if err != nil {
			return err
		}
		if s := done.Status(); !s.OK() {
			return s
		}
		copy(out, buf)
		return nil
	}
}

// Reauthenticate authenticates all paths again, with these keys or, if keys is nil, with the
// present ones: their admin queues, and the I/O queues for which the targets have asked for
// authentication. I/O goes on meanwhile. After success the keys are those of all later
// associations too. After an error everything stays as it was, unless the connection was lost.
// There are two exceptions, in which later associations use the keys: some queues accept them
// (ErrKeysAccepted), or no path is connected (ErrKeysUntried), perhaps because the target does not
// accept the present keys any more.
//
// Errors: *AuthError, ErrNotConnected, or that of ctx while another run has to end first. A command
// that the target does not answer within Config.AdminTimeout, or within Config.IOTimeout on an I/O
// queue, ends the association. So does one that it has not answered when ctx ends: an
// authentication that has stopped half-way would confuse the next one. Any goroutine but the loops'
// may call it.
func (s *Subsystem) Reauthenticate(ctx context.Context, keys *Credentials) error {
	select {
	case s.proving <- struct{}{}:
		defer func() { <-s.proving }()
	case <-ctx.Done():
		return fmt.Errorf("another authentication has not ended: %w", context.Cause(ctx))
	}
	try := s.credentials()
	if keys != nil {
		try = *keys
	}
	accepted, unasked := false, error(nil)
	var errs []error
	paths := s.paths()
	for n, result := range reauthenticateAll(ctx, paths, try) {
		c, err := paths[n], result.err
		accepted = accepted || result.accepted
		switch {
		case errors.Is(err, errNotAgain):
			unasked = err
		case err != nil && len(paths) == 1:
			errs = append(errs, err)
		case err != nil:
			errs = append(errs, fmt.Errorf("path %v: %w", c.Address(), err))
		}
	}
	switch {
	case accepted && len(errs) == 0:
		s.setCredentials(try)
		return nil
	case accepted:
		s.setCredentials(try)
		return fmt.Errorf("%w: %w", ErrKeysAccepted, errors.Join(errs...))
	case len(errs) > 0:
		return errors.Join(errs...)
	case unasked != nil:
		return unasked
	}
	_, err := s.current()
	err = cmp.Or(err, ErrNotConnected) // if there is one again, it has not been asked
	if keys != nil {
		s.setCredentials(try)
		err = fmt.Errorf("%w: %w", ErrKeysUntried, err)
	}
	return err
}

// proof is what became of an association that was authenticated again.
type proof struct {
	accepted bool // by the admin queue
	err      error
}

// reauthenticateAll authenticates all paths again, one after the other. Each has its share of the
// time that is left: a silent target must not take that of the others.
func reauthenticateAll(ctx context.Context, paths []*Controller, keys Credentials) []proof {
	proofs := make([]proof, len(paths))
	for n, c := range paths {
		share, cancel := ctx, context.CancelFunc(func() {})
		if end, ok := ctx.Deadline(); ok {
			share, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(len(paths)-n))
		}
		proofs[n].accepted, proofs[n].err = c.reauthenticate(share, keys)
		cancel()
	}
	return proofs
}

// reauthenticate authenticates the queues of the present association again. accepted says
// whether its admin queue has accepted the keys. Without an association nothing is done.
func (c *Controller) reauthenticate(ctx context.Context, keys Credentials) (accepted bool, err error) {
	c.mu.Lock()
	a := c.assoc
	if a == nil {
		c.mu.Unlock()
		return false, nil // the next one uses the keys
	}
	method := a.method
	c.borrowed.Add(1)
	c.mu.Unlock()
	defer c.borrowed.Done()
	if method == "" {
		return false, &AuthError{0, errNotAgain}
	}
	ctx, done := a.during(ctx)
	defer done()
	defer context.AfterFunc(ctx, func() {
		if err := ctx.Err(); errors.Is(err, context.DeadlineExceeded) {
			a.fail(because(LossCommandTimeout, fmt.Errorf("authentication was not answered: %w", err)))
		}
	})()
	if method, err = c.prove(ctx, 0, keys, a.admin.authPort); err != nil {
		return false, err
	}
	c.mu.Lock()
	a.method = method
	c.mu.Unlock()
	mr, err := c.mem.current().AllocMR(auth.MaxMessage, rdma.AccessRemoteRead|rdma.AccessRemoteWrite|rdma.AccessLocalWrite)
	if err != nil {
		return true, err
	}
	for _, p := range a.pairs {
		if !p.proved {
			continue
		}
		if _, err := c.prove(ctx, p.qid, keys, p.authPort(mr)); err != nil {
			return true, errors.Join(err, mr.Close())
		}
	}
	c.cfg.Log.Info("authenticated again", "method", method)
	return true, mr.Close()
}

// authPort is the port of an I/O queue that is in use. The commands pass through the lane of the
// queue pair, among those of requests. Their data are in mr.
func (p *queuePair) authPort(mr rdma.MR) authPort {
	ns := &Namespace{sub: p.lane.sub} // of no namespace: the queue pair only looks for access
	ns.presence.Store(served)
	ns.views[p.slot].Store(&view{access: optimized})
	home := &nsQueue{ns: ns, lane: p.lane}
	return func(_ context.Context, cmd *nvme.Command, in, out []byte) error {
		buf := mr.Bytes()[:max(len(in), len(out))]
		clear(buf) // the controller may fill less of it
		copy(buf, in)
		d := &direct{cmd: *cmd, mr: mr, done: make(chan struct{})}
		d.cmd.SetKeyedSGL(mr.Addr(), uint32(len(buf)), mr.RKey(), false)
		r := &request{home: home, io: block.Request{Op: opDirect}, direct: d, troubled: true}
		err := p.lane.loop.Call(func() {
			if p.gone {
				d.end(ErrNotConnected)
				return
			}
			p.start(r)
		})
		if err != nil {
			return err
		}
		<-d.done // also if the association is lost: the target may have the buffer until then
		copy(out, buf)
		return d.err
	}
}
