package initiator

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"ublk-nvmeof/nvme"
)

// MaxQuery is the largest number of bytes that a query returns. A controller may have a
// smaller limit (MDTS).
const MaxQuery = adminBuffer

// maxQueries is the number of queries in progress. The controller's own commands need
// the other buffers.
const maxQueries = adminBuffers / 2

// QueryError is a query that is not sent, because it is more than a query or its length
// is wrong.
type QueryError struct{ Reason string }

func (e *QueryError) Error() string { return "not a query: " + e.Reason }

// Query sends an admin command that changes nothing, and fills out with its data. The
// command is an Identify (out is 4096 bytes), a Get Log Page (a multiple of 4 bytes), a
// Get Features (any length) or a Property Get (no data); out has at most MaxQuery bytes.
// Only the namespace id, or the Fabrics command type, and dwords 10 to 15 of cmd count.
//
// The result is that of the completion: a feature's value, or a property. Errors:
// *QueryError, ErrNotConnected, an nvme.Status, the loss of the association, or that of
// ctx. When ctx ends, the command goes on without its caller. A command that the
// controller does not answer within Config.AdminTimeout ends the association. Any
// goroutine may call it; queries beyond a few wait.
func (s *Subsystem) Query(ctx context.Context, cmd *nvme.Command, out []byte) (result uint64, err error) {
	return s.QueryOver(ctx, nil, cmd, out)
}

// QueryOver is Query over one path.
func (s *Subsystem) QueryOver(ctx context.Context, path *Controller, cmd *nvme.Command, out []byte) (result uint64, err error) {
	if err := checkQuery(cmd, len(out)); err != nil {
		return 0, err
	}
	select {
	case s.queries <- struct{}{}:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	a, err := s.over(path)
	if err != nil {
		<-s.queries
		return 0, err
	}
	type answer struct {
		result uint64
		err    error
	}
	answered := make(chan answer, 1)
	data := make([]byte, len(out))
	go func() {
		defer func() { <-s.queries }()
		done, err := a.admin.exec(s.life, bare(cmd), nil, data)
		answered <- answer{done.Result(), err}
	}()
	select {
	case got := <-answered:
		if got.err == nil {
			copy(out, data)
		}
		return got.result, got.err
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// over returns the association of a path; nil stands for any.
func (s *Subsystem) over(path *Controller) (*association, error) {
	if path == nil {
		return s.current()
	}
	if a := path.current(); a != nil {
		return a, nil
	}
	return nil, fmt.Errorf("%w over path %v: %w", ErrNotConnected, path.Address(), cmp.Or(path.lossReason(), errNoAssociation))
}

// errNoAssociation is why a path is not connected that never was.
var errNoAssociation = errors.New("it has not been connected yet")

// bare returns a command with those fields of cmd that a query may choose.
func bare(cmd *nvme.Command) *nvme.Command {
	out := new(nvme.Command)
	out.SetOpcode(cmd.Opcode())
	out[1] = nvme.PSDTSGL
	out.SetNSID(cmd.NSID()) // includes the Fabrics command type
	copy(out[40:], cmd[40:])
	out.SetKeyedSGL(0, 0, 0, false)
	return out
}

// checkQuery reports whether a command only reads n bytes.
func checkQuery(cmd *nvme.Command, n int) error {
	bad := func(format string, args ...any) error { return &QueryError{fmt.Sprintf(format, args...)} }
	if n > MaxQuery {
		return bad("%d bytes are more than %d", n, MaxQuery)
	}
	switch op := cmd.Opcode(); op {
	case nvme.AdminIdentify:
		if n != nvme.IdentifySize {
			return bad("%d bytes of identify data; want %d", n, nvme.IdentifySize)
		}
	case nvme.AdminGetLogPage:
		if _, length, _, _ := cmd.LogPage(); uint64(n) != length {
			return bad("%d bytes of a log page; the command says %d", n, length)
		}
	case nvme.AdminGetFeatures:
	case nvme.OpFabrics:
		if t := cmd.FCType(); t != nvme.FabricsPropertyGet {
			return bad("the Fabrics command is %v; want property get", t)
		}
		if n != 0 {
			return bad("%d bytes; a property has none", n)
		}
	default:
		return bad("the command is %s; want identify, get log page, get features or property get", op.AdminString())
	}
	return nil
}

// errReset is why an association ends that is reset.
var errReset = because(LossReset, errors.New("controller was reset"))

// Reset ends the associations of all paths, one after the other, and returns when the next
// ones are in use. Requests wait meanwhile, or take another path, as after any other loss.
// Errors: ErrNotConnected if there is no association to end, the reason if the subsystem is
// given up or closed, or that of ctx; the paths go on to connect then. Any goroutine but the
// loops'.
func (s *Subsystem) Reset(ctx context.Context) error {
	err := ErrNotConnected
	for _, c := range s.paths() {
		if c.current() == nil {
			continue
		}
		if err = c.Reset(ctx); err != nil {
			return err
		}
	}
	return err
}

// Reset ends the association and returns when the next one is in use. Errors are those of
// Subsystem.Reset.
func (c *Controller) Reset(ctx context.Context) error {
	c.mu.Lock()
	a, losses := c.assoc, c.losses
	c.mu.Unlock()
	if a == nil {
		return ErrNotConnected
	}
	a.fail(errReset)
	for {
		c.mu.Lock()
		attached, again := c.attached, c.assoc != nil && c.losses > losses
		c.mu.Unlock()
		if again {
			return nil
		}
		select {
		case <-attached:
		case <-c.life.Done():
			return context.Cause(c.life)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Rescan has the namespaces looked at soon over all paths, as if the target had said that they
// changed. The error is ErrNotConnected. Any goroutine may call it.
func (s *Subsystem) Rescan() error {
	_, err := s.current()
	for _, c := range s.paths() {
		if a := c.current(); a != nil {
			a.lookAtNamespaces()
		}
	}
	return err
}
