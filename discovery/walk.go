package discovery

import (
	"context"
	"fmt"
	"iter"
	"net/netip"

	"ublk-nvmeof/nvme"
)

// Conn is a connection to a discovery controller.
type Conn interface {
	Reader
	Close(ctx context.Context) error
}

// Opener connects to a discovery service.
type Opener func(ctx context.Context, at Endpoint) (Conn, error)

// Page is the log of one service, or why it could not be read.
type Page struct {
	From  Endpoint
	Depth int // referrals that led to it
	Log   *Log
	Err   error
}

// Endpoint returns where an entry of the log leads to, as Entry.Endpoint does. A link-local
// address is on the link by which the service was reached.
func (p Page) Endpoint(e *Entry) (Endpoint, error) {
	at, err := e.Endpoint()
	if a := at.Address.Addr(); err == nil && a.Is6() && a.IsLinkLocalUnicast() {
		at.Address = netip.AddrPortFrom(a.WithZone(p.From.Address.Addr().Zone()), at.Address.Port())
	}
	return at, err
}

// Referrals returns the services that the log refers to. Entries that cannot be used are
// left out.
func (p Page) Referrals() (out []Endpoint) {
	if p.Log == nil {
		return nil
	}
	for i := range p.Log.Entries {
		e := &p.Log.Entries[i]
		if e.SUBTYPE() != nvme.SubsystemReferral {
			continue
		}
		if at, err := p.Endpoint(e); err == nil {
			out = append(out, at)
		}
	}
	return out
}

// Walk reads the log of a service and of all services that it refers to, directly or not,
// each once, nearest first. It goes on after a service that cannot be reached. When a limit
// ends the walk, the last page says so. ctx bounds the whole of it.
func Walk(ctx context.Context, root Endpoint, open Opener, limits Limits) iter.Seq[Page] {
	limits = limits.withDefaults()
	return func(yield func(Page) bool) {
		queue := []Page{{From: root}}
		seen := map[Endpoint]bool{root: true}
		for read := 0; len(queue) > 0; read++ {
			p := queue[0]
			queue = queue[1:]
			if err := limits.allow(p, read); err != nil {
				yield(Page{From: p.From, Depth: p.Depth, Err: err})
				return
			}
			p.Log, p.Err = visit(ctx, p.From, open, limits)
			if !yield(p) || ctx.Err() != nil {
				return
			}
			for _, at := range p.Referrals() {
				// One more than may be read is enough to say so.
				if !seen[at] && len(seen) <= limits.Services {
					seen[at] = true
					queue = append(queue, Page{From: at, Depth: p.Depth + 1})
				}
			}
		}
	}
}

// allow reports why a service is not visited after so many others.
func (l Limits) allow(p Page, read int) error {
	switch {
	case p.Depth > l.Depth:
		return fmt.Errorf("referral to %s is not followed: it is the end of a chain of more than %d", p.From, l.Depth)
	case read >= l.Services:
		return fmt.Errorf("referral to %s is not followed: %d discovery services have been read", p.From, read)
	}
	return nil
}

// visit reads the log of one service.
func visit(ctx context.Context, at Endpoint, open Opener, limits Limits) (*Log, error) {
	within, cancel := context.WithTimeout(ctx, limits.Time)
	defer cancel()
	conn, err := open(within, at)
	if err != nil {
		return nil, err
	}
	log, err := Read(within, conn, limits)
	_ = conn.Close(within) // a service that is not left in order notices the end of the connection
	return log, err
}
