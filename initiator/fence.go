package initiator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ublk-nvmeof/rdma"
)

// A write that was in flight when an association was lost is sent again over the
// next. The target may still be working on the first copy, and must not finish
// it after a newer write to the same blocks. So nothing is sent over the next
// association until the target has ended the old one's controller, which it does
// when all commands of its queues have ended (nvmet_sq_destroy; NVMe Base,
// "Controller Level Reset"). A target that has heard of the end of the
// connections does so at once; one that has not, when the keep alive timer
// expires.
//
// Whether a controller is there still is asked by a Connect of an I/O queue to
// it. "Invalid parameter: controller id" says that it is not.

// The time between two such questions begins with fencePause and doubles: each
// costs the target a connection.
const (
	fencePause    = 10 * time.Millisecond
	fencePauseMax = 500 * time.Millisecond
)

// patience is the time within which a target ends a controller whose host fell
// silent (NVMe Base 2.1, "Communication Loss Handling"; TP4129): up to twice the keep
// alive timeout, or three times if it takes any command as a sign of life (TBKAS), and
// the time that it names for quiescing commands (CQT). A second is ours.
func (c *Controller) patience(a *association, keepAlive time.Duration) time.Duration {
	timeouts := time.Duration(2)
	if a.identify.TBKAS() {
		timeouts = 3
	}
	return timeouts*keepAlive + time.Duration(a.identify.CQT())*time.Millisecond + time.Second
}

// fenceAll waits until the target of a has ended every controller that commands were
// sent to.
func (c *Controller) fenceAll(ctx context.Context, a *association) error {
	for len(c.unfenced) > 0 {
		if err := c.fence(ctx, a, c.unfenced[0], a.born.Add(c.patience(a, c.cfg.KeepAlive))); err != nil {
			return err
		}
		c.unfenced = c.unfenced[1:]
	}
	return nil
}

// fence waits until controller cntlid is no more at the target of a, or until the time
// until, when a target that keeps its time has ended it anyway. That is patience after the
// target answered anew, or later: the timers of one that stood still did not run before. The
// error is that a, or ctx, ended before.
func (c *Controller) fence(ctx context.Context, a *association, cntlid uint16, until time.Time) error {
	if cntlid == a.cntlid {
		return nil // its id is ours now
	}
	began, alive := time.Now(), time.Now()
	pause := fencePause
	for asked := 1; ; asked++ {
		there, err := c.exists(ctx, a, cntlid)
		switch {
		case err == nil && !there:
			c.cfg.Log.Debug("old controller has ended", "controller", cntlid, "after", time.Since(began).Round(time.Millisecond))
			return nil
		case time.Now().After(until):
			c.cfg.Log.Warn("target still has the old controller, which it should have ended; I/O goes on", "controller", cntlid, "error", err)
			return nil
		case asked == 1:
			c.cfg.Log.Info("target still has the old controller; I/O waits for its end", "controller", cntlid,
				"at_most", time.Until(until).Round(time.Second), "error", err)
		}
		if time.Since(alive) > c.cfg.KeepAlive/4 {
			alive = time.Now()
			if err := c.ping(ctx, a); err != nil {
				return &StepError{"wait for the end of the old controller", err}
			}
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, fencePauseMax)
		case err := <-a.lost:
			a.fail(err) // for who waits for it
			return &StepError{"wait for the end of the old controller", err}
		case <-ctx.Done():
			return &StepError{"wait for the end of the old controller", context.Cause(ctx)}
		}
	}
}

// exists asks whether the target has a controller.
func (c *Controller) exists(ctx context.Context, a *association, cntlid uint16) (bool, error) {
	q := queueParam{remote: a.remote, qid: 1, depth: MinQueueSize, cntlid: cntlid}
	conn, err := c.dial(ctx, q)
	if err != nil {
		return false, err
	}
	// Its own memory: the association may end while the target reads it.
	mr, err := c.mem.domain().AllocMR(adminPage, rdma.AccessRemoteRead)
	if err != nil {
		return false, errors.Join(err, conn.close())
	}
	err = c.establish(ctx, conn, q)
	if err == nil {
		_, err = c.connectCommand(ctx, conn, q, mr, 0)
	}
	err = errors.Join(conn.close(), mr.Close(), err)
	var param ConnectParam
	switch {
	case errors.As(err, &param) && param.IsCNTLID():
		return false, nil
	case errors.As(err, new(ConnectStatus)):
		return true, nil // it was found, and refuses: the queue is there, for one
	case err != nil:
		return false, fmt.Errorf("ask for controller %d: %w", cntlid, err)
	}
	return true, nil
}

// Outlive waits until the target has ended controllers of an earlier process,
// whose commands will be sent again by this one, or until it should have: by their keep
// alive timeout, if that is longer than this controller's. To be called before the first
// I/O.
func (c *Controller) Outlive(ctx context.Context, keepAlive time.Duration, cntlids ...uint16) error {
	began := time.Now() // the earlier process may have ended just now
	for _, id := range cntlids {
		for {
			c.mu.Lock()
			a := c.assoc
			c.mu.Unlock()
			var err error
			if a != nil {
				since := began
				if a.born.After(since) {
					since = a.born
				}
				if err = c.fence(ctx, a, id, since.Add(c.patience(a, max(keepAlive, c.cfg.KeepAlive)))); err == nil {
					break
				}
			}
			// The next association may do better.
			select {
			case <-time.After(fencePause):
			case <-ctx.Done():
				return errors.Join(context.Cause(ctx), err)
			case <-c.dead:
				return c.Err()
			}
		}
	}
	return nil
}
