package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// A write that was in flight when an association was lost is sent again over the next
// association. The target may still be working on the first copy, and must not finish it
// after a newer write to the same blocks. So the host sends nothing over the next
// association until the target has ended the controller of the old one. A target ends a
// controller when all commands of its queues have ended (nvmet_sq_destroy; NVMe Base,
// "Controller Level Reset"). It does so at once if it learned of the end of the
// connections, and otherwise when the keep alive timer expires.
//
// To find out whether a controller still exists, the host sends a Connect of an I/O queue
// to it. "Invalid parameter: controller id" means that it does not exist. While the target
// answers that it exists, the host sends nothing, unless there is proof that the target gave
// the id to another association since (Config.Superseded); only the loss times limit this wait.
// Without an answer, or with an unclear one, the host must wait as well. It then sends
// after the time within which a target ends such a controller. Only time in which the
// target demonstrably ran counts.

// The pause between two questions is fencePause at first and doubles, because each question
// costs the target a connection.
const (
	fencePause    = 10 * time.Millisecond
	fencePauseMax = 500 * time.Millisecond
	// fenceStep is the largest part of the time between two answers that counts as time
	// in which the target's timers ran. If the target stood still for longer, the rest
	// does not count.
	fenceStep = time.Second
)

// patience returns the time within which a target ends a controller whose host fell silent
// (NVMe Base 2.1, "Communication Loss Handling"; TP4129): up to twice the keep alive
// timeout, or three times if any command restarts the target's timer (TBKAS), plus the
// command quiesce time of the target (CQT). One second is added as a margin.
func (c *Controller) patience(a *association, keepAlive time.Duration) time.Duration {
	timeouts := time.Duration(2)
	if a.identify.TBKAS() {
		timeouts = 3
	}
	return timeouts*keepAlive + time.Duration(a.identify.CQT())*time.Millisecond + time.Second
}

// fencing is one wait for the end of an old controller.
type fencing struct {
	ctrl     *Controller
	a        *association
	remnant  *remnant
	began    time.Time
	answered time.Time     // when the target last answered anything
	lived    time.Duration // what the target has lived through since it last said that it has the controller
	reported bool
}

// fence waits until the target of a has ended the controller of a remnant, or the remnant has
// ended otherwise. It returns an error if a fails or ctx is done before.
func (c *Controller) fence(ctx context.Context, a *association, rem *remnant) error {
	cntlid := rem.id.CNTLID
	if cntlid == a.cntlid {
		return nil // the new controller has its id
	}
	patience := c.patience(a, rem.keepAlive)
	f := &fencing{ctrl: c, a: a, remnant: rem, began: time.Now(), answered: time.Now()}
	for pause := fencePause; ; pause = min(2*pause, fencePauseMax) {
		presence, err := c.ask(ctx, a, cntlid)
		if err == nil {
			f.alive()
		}
		switch {
		case presence == ended:
			c.cfg.Log.Debug("old controller has ended", "controller", cntlid, "after", time.Since(f.began).Round(time.Millisecond))
			return nil
		case presence != unclear && c.sub.inherited(rem, a):
			c.cfg.Log.Info("the id of the old controller is that of another path by now", "controller", cntlid)
			return nil
		case presence != unclear && c.superseded(ctx, a, rem.id):
			c.cfg.Log.Info("the id of the old controller is another association's by now", "controller", cntlid)
			return nil
		case presence == unclear && f.lived >= patience:
			c.cfg.Log.Warn("target does not tell whether the old controller exists, but must have ended it by now; I/O continues",
				"controller", cntlid, "error", err)
			return nil
		}
		f.report(err)
		wait := pause
		if presence == joined && time.Since(f.began) >= patience {
			// Questions may be what keeps the old controller alive.
			wait = patience
		}
		if presence != unclear {
			f.lived = 0 // only time in which the target does not tell counts
			rem.exists(fmt.Sprintf("the target at %v, which says that the controller exists, to say that it is gone", a.remote))
		}
		if err := f.wait(ctx, wait); errors.Is(err, errOver) {
			return nil
		} else if err != nil {
			return &StepError{"wait for the end of the old controller", err}
		}
	}
}

// errOver ends a wait because the remnant has ended.
var errOver = errors.New("the old controller has ended")

// alive records an answer of the target.
func (f *fencing) alive() {
	now := time.Now()
	f.lived += min(now.Sub(f.answered), fenceStep)
	f.answered = now
}

// report logs the first wait.
func (f *fencing) report(err error) {
	if f.reported {
		return
	}
	f.reported = true
	f.ctrl.cfg.Log.Info("I/O waits until the target has ended the old controller", "controller", f.remnant.id.CNTLID, "error", err)
}

// wait waits for d and keeps the new association alive.
func (f *fencing) wait(ctx context.Context, d time.Duration) error {
	for end := time.Now().Add(d); ; {
		left := time.Until(end)
		select {
		case <-time.After(min(left, f.ctrl.cfg.KeepAlive/4)):
		case <-f.remnant.over:
			return errOver
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if time.Since(f.answered) >= f.ctrl.cfg.KeepAlive/4 {
			if err := f.ctrl.ping(ctx, f.a, f.ctrl.cfg.KeepAlive); err != nil {
				return err
			}
			f.alive()
		}
		if time.Now().After(end) {
			return nil
		}
	}
}

// superseded reports whether the controller that the target has under an old id is proven
// to be another association's. It takes as long as a question at most.
func (c *Controller) superseded(ctx context.Context, a *association, id ControllerID) bool {
	if c.cfg.Superseded == nil {
		return false
	}
	at := id.Address
	if !at.IsValid() {
		at = a.remote
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.KeepAlive/2)
	defer cancel()
	return c.cfg.Superseded(ctx, Present{
		Address: at, CNTLID: id.CNTLID, Serial: a.identify.SN(), Model: a.identify.MN(),
	})
}

// existence is the answer to whether a target has a controller.
type existence uint8

const (
	unclear existence = iota // no answer, or an unclear one
	ended                    // the target does not have the controller
	present                  // the target has the controller
	joined                   // the target has the controller, which accepted the connection as its queue
)

// ask asks whether the target has a controller. It takes at most half the keep alive
// timeout, so that the new association stays alive.
func (c *Controller) ask(ctx context.Context, a *association, cntlid uint16) (existence, error) {
	if !c.borrow(a) {
		return unclear, rdma.ErrClosed
	}
	defer c.borrowed.Done()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.KeepAlive/2)
	defer cancel()
	q := queueParam{remote: a.remote, qid: 1, depth: MinQueueSize, cntlid: cntlid}
	conn, err := c.dial(ctx, q)
	if err != nil {
		return unclear, err
	}
	// The connection needs its own memory, because the association may end while the
	// target reads it.
	mr, err := c.mem.current().AllocMR(adminPage, rdma.AccessRemoteRead)
	if err != nil {
		return unclear, errors.Join(err, conn.close())
	}
	err = c.establish(ctx, conn, q)
	if err == nil {
		_, err = c.connectCommand(ctx, conn, q, mr, 0)
	}
	if cerr := errors.Join(conn.close(), mr.Close()); cerr != nil {
		c.cfg.Log.Warn("cannot close the connection that asked for the old controller", "error", cerr)
	}
	presence := existenceOf(err)
	if presence != unclear {
		err = nil
	}
	return presence, err
}

// existenceOf interprets the answer to a Connect of queue 1 to a controller. A target that
// checks the queue has found the controller: nvmet and package target answer that the
// queue exists (Command Sequence Error, DNR), and SPDK that its id is wrong.
func existenceOf(err error) existence {
	var param ConnectParam
	var refused ConnectStatus
	switch {
	case err == nil:
		return joined
	case errors.As(err, &param) && param.IsCNTLID():
		return ended
	case errors.As(err, &param) && !nvme.ConnectInvalidParam(param).InData():
		return present
	case errors.As(err, &refused) && nvme.Status(refused).Code() == nvme.StatusCommandSequence:
		return present
	}
	return unclear
}

// Outlive waits until the target has ended the given controllers of an earlier process.
// keepAlive is their keep alive timeout. This process may then send their commands again.
// Each controller is asked for at its own address. While there is no path to that address,
// or it has no association, the other paths are asked. If they cannot tell, Outlive waits for
// as long as a target may need to end a controller. Call Outlive before the first I/O. With
// Config.NoFence it does not wait.
func (s *Subsystem) Outlive(ctx context.Context, keepAlive time.Duration, ids ...ControllerID) error {
	if s.cfg.NoFence {
		return nil
	}
	began := time.Now()
	for _, id := range ids {
		if err := s.outlive(ctx, began, keepAlive, id); err != nil {
			return err
		}
	}
	return nil
}

// outlive is Outlive for one controller. The wait for all of them began at the same time.
func (s *Subsystem) outlive(ctx context.Context, began time.Time, keepAlive time.Duration, id ControllerID) error {
	rem := &remnant{ctrl: s.pathTo(id.Address), id: id, keepAlive: max(keepAlive, s.cfg.KeepAlive), alive: began, over: make(chan struct{})}
	knows := make(map[*association]bool)
	for pause := fencePause; ; pause = min(2*pause, fencePauseMax) {
		var a *association
		if rem.ctrl != nil {
			a = rem.ctrl.current()
		}
		var err error
		if a != nil {
			during, cancel := a.during(ctx)
			err = rem.ctrl.fence(during, a, rem)
			cancel()
			if err == nil && rem.ctrl.serves(a) {
				return nil
			}
		} else if s.endedElsewhere(ctx, rem, knows) {
			return nil
		}
		// The next association may succeed.
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-s.dead:
			return s.Err()
		}
	}
}

// endedElsewhere asks all paths for a controller of an earlier process, whose own address has no
// association. It reports whether the controller must have ended. knows collects the associations
// that have known the controller. The target of another path may be a process that never knew it,
// whose word is then no proof.
func (s *Subsystem) endedElsewhere(ctx context.Context, rem *remnant, knows map[*association]bool) bool {
	connected := false
	for _, c := range s.paths() {
		a := c.current()
		if a == nil {
			continue
		}
		connected = true
		rem.patience = max(rem.patience, c.longestPatience(rem.keepAlive), c.patience(a, rem.keepAlive))
		if a.cntlid == rem.id.CNTLID {
			continue // the answer would be about this association
		}
		during, cancel := a.during(ctx)
		presence, _ := c.ask(during, a, rem.id.CNTLID)
		switch {
		case presence == ended && knows[a]:
			cancel()
			return true
		case presence == present || presence == joined:
			if s.inherited(rem, a) || c.superseded(during, a, rem.id) {
				cancel()
				return true
			}
			knows[a] = true
			rem.exists(fmt.Sprintf("path %v, which says that the controller exists, to say that it is gone", a.remote))
		}
		cancel()
	}
	if !connected || rem.left() > 0 {
		return false
	}
	s.cfg.Log.Warn("no path can tell whether an old controller exists, but its target must have ended it by now; I/O continues",
		"controller", rem.id.CNTLID, "address", rem.id.Address.String(), "after", rem.patience)
	return true
}

// pathTo returns the path to an address, or nil. If the address is not known, it is the first
// path.
func (s *Subsystem) pathTo(address netip.AddrPort) *Controller {
	paths := s.paths()
	for _, c := range paths {
		if !address.IsValid() || c.cfg.Address == address || c.Address() == address {
			return c
		}
	}
	return nil
}

// longestPatience is patience for a target that cannot say what it announces.
func (c *Controller) longestPatience(keepAlive time.Duration) time.Duration {
	a := &association{}
	a.identify.SetCTRATT(nvme.CTRATTTBKAS)
	return c.patience(a, keepAlive)
}

// OutliveTime returns the longest time that Outlive takes for n controllers with the given
// keep alive timeout, as long as the target answers. If the target does not tell whether
// the controllers exist, Outlive waits for each of them as long as the target may need to
// end it. It waits once more if its questions may have kept a controller alive.
func (s *Subsystem) OutliveTime(keepAlive time.Duration, n int) time.Duration {
	longest := time.Duration(0)
	for _, c := range s.paths() {
		keepAlive := max(keepAlive, c.cfg.KeepAlive)
		if a := c.current(); a != nil {
			longest = max(longest, c.patience(a, keepAlive))
		} else { // lost; what the next one announces is unknown
			longest = max(longest, c.longestPatience(keepAlive))
		}
	}
	return time.Duration(n+1) * longest
}

// serves reports whether a is the association in use.
func (c *Controller) serves(a *association) bool { return c.current() == a }
