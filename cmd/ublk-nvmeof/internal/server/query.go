package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// Query implements control.Controlled.
func (s *server) Query(ctx context.Context, q control.Query) (control.QueryResult, error) {
	switch {
	case len(q.Command) != nvme.CommandSize:
		return control.QueryResult{}, exit.Errorf(exit.Usage, "the command has %d bytes; want %d", len(q.Command), nvme.CommandSize)
	case q.Length < 0 || q.Length > initiator.MaxQuery:
		return control.QueryResult{}, exit.Errorf(exit.Usage, "length %d; want 0 to %d", q.Length, initiator.MaxQuery)
	}
	sub, err := s.connected()
	if err != nil {
		return control.QueryResult{}, err
	}
	path, err := s.pathForQuery(sub, q.Path)
	if err != nil {
		return control.QueryResult{}, err
	}
	r := control.QueryResult{}
	if path != nil {
		r.Path = pathOf(path.Info()).String()
	}
	if q.Length > 0 {
		r.Data = make([]byte, q.Length)
	}
	cmd := nvme.CommandAt(q.Command)
	r.Result, err = sub.QueryOver(ctx, path, cmd, r.Data)
	if path != nil && errors.Is(err, initiator.ErrNotConnected) {
		return r, exit.Errorf(exit.Busy, "%v", err)
	}
	return r, during(cmd.Opcode().AdminString(), s.explainRefusal(err))
}

// pathForQuery returns the path that a query names, or the first that is connected. It is nil if
// there is only one, or none is connected.
func (s *server) pathForQuery(sub subsystem, name string) (*initiator.Controller, error) {
	if name != "" {
		p, err := options.ParsePath(name)
		if err != nil {
			return nil, exit.Errorf(exit.Usage, "path %q: %v", name, err)
		}
		return s.pathTo(p)
	}
	all := sub.Paths()
	i := slices.IndexFunc(all, func(c *initiator.Controller) bool { return c.Info().CNTLID != 0 })
	if len(all) < 2 || i < 0 {
		return nil, nil
	}
	return all[i], nil
}

// Reserve implements control.Controlled.
func (s *server) Reserve(ctx context.Context, r control.Reservation) ([]byte, error) {
	if len(r.Command) != nvme.CommandSize {
		return nil, exit.Errorf(exit.Usage, "the command has %d bytes; want %d", len(r.Command), nvme.CommandSize)
	}
	cmd := nvme.CommandAt(r.Command)
	for _, v := range s.devices() {
		if v.nsid == r.NSID && v.reserve != nil {
			if nvme.IsWrite(cmd) {
				s.log.Info("reservation on request", "command", cmd.Opcode().IOString(), "nsid", v.nsid)
			}
			return r.Data, during(cmd.Opcode().IOString(), s.explainRefusal(v.reserve(ctx, cmd, r.Data)))
		}
	}
	return nil, exit.Errorf(exit.NotFound, "the server does not serve namespace %d", r.NSID)
}

// Reset implements control.Controlled.
func (s *server) Reset(ctx context.Context) error {
	sub, err := s.connected()
	if err != nil {
		return err
	}
	s.log.Info("controller is reset on request")
	return s.explainRefusal(sub.Reset(ctx))
}

// Rescan implements control.Controlled.
func (s *server) Rescan(context.Context) error {
	sub, err := s.connected()
	if err != nil {
		return err
	}
	return s.explainRefusal(sub.Rescan())
}

// connected returns the subsystem of a server that has connected to it.
func (s *server) connected() (subsystem, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sub == nil {
		return nil, exit.Errorf(exit.Busy, "the server is still connecting")
	}
	return s.sub, nil
}

// awaitConnected waits until the server has connected.
func (s *server) awaitConnected(ctx context.Context) error {
	select {
	case <-s.linked:
	case <-s.ended:
	case <-ctx.Done():
	}
	_, err := s.connected()
	return err
}

// during names the command that an error of explainRefusal is about.
func during(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// explainRefusal says in words why a request to the controller failed. The verb that asked
// puts its name before it.
func (s *server) explainRefusal(err error) error {
	var (
		status nvme.Status
		bad    *initiator.QueryError
	)
	switch {
	case errors.As(err, &bad):
		return exit.Errorf(exit.Usage, "%v", err)
	case errors.Is(err, initiator.ErrNotConnected):
		now := s.sub.Info()
		reason := ""
		if why := now.Paths[0].Reason; why != nil {
			reason = ": " + why.Error()
		}
		if why := now.Paths[0].Failure; why != nil {
			reason += "; last attempt: " + why.Error()
		}
		return exit.Errorf(exit.Busy, "the controller is not connected, it is %v%s", now.State, reason)
	case errors.Is(err, os.ErrNotExist):
		return exit.Errorf(exit.NotFound, "%v", err)
	case errors.As(err, &status):
		return fmt.Errorf("the target answered: %w", err)
	}
	return err
}
