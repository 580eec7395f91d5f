package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// maxAddresses is the largest number of addresses that are tried for one association.
const maxAddresses = 8

// reach connects an association's admin queue to the first address of the target that
// accepts it. If ctx has a deadline, each address gets an equal share of the time that is
// left. If there are several addresses, the error names each of them.
func (c *Controller) reach(ctx context.Context, p queueParam) (*connection, netip.AddrPort, error) {
	addresses, err := c.addresses(ctx)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	var errs []error
	for i, remote := range addresses {
		p.remote = remote
		conn, err := c.reachOne(ctx, p, len(addresses)-i)
		if err == nil {
			return conn, remote, nil
		}
		if len(addresses) > 1 {
			err = fmt.Errorf("%s: %w", remote, err)
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

// reachOne tries one address. left is the number of addresses not yet tried, including
// this one.
func (c *Controller) reachOne(ctx context.Context, p queueParam, left int) (*connection, error) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
	}
	conn, err := c.dial(ctx, p)
	if err != nil {
		return nil, err
	}
	if err := c.establish(ctx, conn, p); err != nil {
		return nil, errors.Join(err, conn.close())
	}
	return conn, nil
}

// addresses returns the addresses to try for the next association, in order. The address
// of the last association comes first. It is the only one until the target must have
// ended the controller of that association, because another address may belong to another
// machine, which cannot report whether the controller still executes commands.
func (c *Controller) addresses(ctx context.Context) ([]netip.AddrPort, error) {
	c.mu.Lock()
	last, recent := c.remote, time.Since(c.since) <= c.lastPatience
	c.mu.Unlock()
	switch {
	case c.cfg.Resolve == nil:
		return []netip.AddrPort{c.cfg.Address}, nil
	case last.IsValid() && recent:
		return []netip.AddrPort{last}, nil
	}
	found, err := c.cfg.Resolve(ctx)
	switch {
	case err != nil && last.IsValid():
		c.cfg.Log.Warn("addresses of the target cannot be resolved; the last one is tried", "address", last.String(), "error", err)
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, errors.New("the target has no address")
	}
	var out []netip.AddrPort
	for _, a := range slices.Concat([]netip.AddrPort{last}, found) {
		if a.IsValid() && a.Port() != 0 && !slices.Contains(out, a) && len(out) < maxAddresses {
			out = append(out, a)
		}
	}
	return out, nil
}
