package targetserver

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// maxBody is the largest size of a request in bytes.
const maxBody = 64 << 10

// locked returns a function that calls do with the lock held.
func locked[T any](s *server, do func(T) (Done, error)) func(T) (Done, error) {
	return func(request T) (Done, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return do(request)
	}
}

// handle registers do as the handler of a kind of request.
func handle[T any](mux *http.ServeMux, s *server, do func(T) (Done, error)) {
	var zero T
	mux.HandleFunc("POST "+path(zero), func(w http.ResponseWriter, r *http.Request) {
		var request T
		var done Done
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		decoder.DisallowUnknownFields()
		err := decoder.Decode(&request)
		if err != nil {
			err = exit.Errorf(exit.Usage, "%v", err)
		} else {
			done, err = do(request)
		}
		if e := exit.From(err); e != nil {
			control.Answer(w, http.StatusBadRequest, e)
			return
		}
		s.log.Info("request", "path", r.URL.Path, "request", fmt.Sprintf("%+v", request))
		control.Answer(w, http.StatusOK, done)
	})
}

func (s *server) mux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { control.Answer(w, http.StatusOK, s.status()) })
	handle(mux, s, locked(s, s.grant))
	handle(mux, s, locked(s, s.drop))
	handle(mux, s, locked(s, s.stall))
	handle(mux, s, locked(s, s.addFault))
	handle(mux, s, locked(s, s.unfault))
	handle(mux, s, locked(s, s.reject))
	handle(mux, s, locked(s, s.refuse))
	handle(mux, s, locked(s, s.ana))
	handle(mux, s, locked(s, s.freeze))
	handle(mux, s, locked(s, s.hide))
	handle(mux, s, locked(s, s.referral))
	handle(mux, s, locked(s, s.auth))
	handle(mux, s, s.add)
	handle(mux, s, s.remove)
	handle(mux, s, s.resize)
	handle(mux, s, s.readOnly)
	handle(mux, s, func(StopRequest) (Done, error) {
		s.once.Do(func() { close(s.stop) })
		return Done{}, nil
	})
	return mux
}

// The methods below carry out requests. The caller holds the lock, except for requests
// that change namespaces. These may wait, and take the lock themselves.

// named returns the subsystems that a request applies to.
func (s *server) named(nqn string) ([]*subsystem, error) {
	if nqn == "" {
		return s.subsystems, nil
	}
	i := slices.IndexFunc(s.subsystems, func(sub *subsystem) bool { return sub.cfg.NQN == nqn })
	if i < 0 {
		return nil, exit.Errorf(exit.NotFound, "no subsystem %s", nqn)
	}
	return s.subsystems[i : i+1], nil
}

// one returns the subsystem that a request about one subsystem applies to.
func (s *server) one(nqn string) (*subsystem, error) {
	found, err := s.named(nqn)
	if err == nil && len(found) != 1 {
		err = exit.Errorf(exit.Usage, "there are %d subsystems; want --nqn", len(found))
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// namespace returns the namespace that a request applies to, and its subsystem.
func (s *server) namespace(nqn string, nsid uint32) (*subsystem, *namespace, error) {
	sub, err := s.one(nqn)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range sub.namespaces {
		if n.NSID() == nsid {
			return sub, n, nil
		}
	}
	return nil, nil, exit.Errorf(exit.NotFound, "subsystem %s has no namespace %d", sub.cfg.NQN, nsid)
}

func (s *server) referral(r ReferralRequest) (Done, error) {
	to, err := options.ParseReferral(r.Address)
	switch {
	case err != nil:
		return Done{}, exit.Errorf(exit.Usage, "referral %q: want %s", r.Address, options.ReferralWords)
	case r.Remove:
		err = s.target.RemoveReferral(to)
	default:
		err = s.target.AddReferral(to)
	}
	return Done{}, err
}

func (s *server) auth(r AuthRequest) (Done, error) {
	sub, err := s.one(r.NQN)
	if err != nil {
		return Done{}, err
	}
	if len(sub.cfg.AllowHosts) > 0 && !slices.Contains(sub.cfg.AllowHosts, r.Host) {
		return Done{}, exit.Errorf(exit.NotFound, "subsystem %s does not admit host %s; it admits %s", sub.cfg.NQN, r.Host, strings.Join(sub.cfg.AllowHosts, ", "))
	}
	i := slices.IndexFunc(sub.cfg.Auth, func(a options.HostAuth) bool { return a.Host == r.Host })
	var have *target.HostAuth
	if i >= 0 {
		have = &sub.cfg.Auth[i].HostAuth
	}
	next, err := r.Auth.Apply(have)
	if err == nil {
		err = sub.SetHostAuth(r.Host, next)
	}
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "%v", err)
	}
	if i >= 0 {
		sub.cfg.Auth = slices.Delete(slices.Clone(sub.cfg.Auth), i, i+1)
	}
	if next != nil {
		sub.cfg.Auth = append(slices.Clip(sub.cfg.Auth), options.HostAuth{Host: r.Host, HostAuth: *next})
	}
	return Done{}, nil
}

func (s *server) grant(r GrantRequest) (Done, error) {
	if r.Exactly {
		if r.Limit < 0 || r.Limit > nvme.MaxQueues {
			return Done{}, exit.Errorf(exit.Usage, "%d queues; want 0 to %d", r.Limit, nvme.MaxQueues)
		}
		s.standing.Grant = strconv.Itoa(r.Limit)
		if r.Limit == 0 {
			s.standing.Grant = "none"
			r.Limit = -1
		}
		s.target.Faults().Grant(r.Limit)
		return Done{}, nil
	}
	found, err := s.named(r.NQN)
	if err != nil {
		return Done{}, err
	}
	for _, sub := range found {
		if err := sub.SetMaxQueues(r.Limit); err != nil {
			return Done{}, exit.Errorf(exit.Usage, "%v", err)
		}
		sub.cfg.MaxQueues = r.Limit
	}
	s.target.Faults().Grant(0)
	s.standing.Grant = ""
	return Done{}, nil
}

// port returns the port with a number.
func (s *server) port(id uint16) (*target.Port, error) {
	all := s.target.Ports()
	i := slices.IndexFunc(all, func(p *target.Port) bool { return p.ID() == id })
	if i < 0 {
		return nil, exit.Errorf(exit.NotFound, "the target has no port %d", id)
	}
	return all[i], nil
}

func (s *server) drop(r DropRequest) (Done, error) {
	if r.Port != 0 {
		if r.NQN != "" || r.QID >= 0 {
			return Done{}, exit.Errorf(exit.Usage, "all connections of a port are dropped; want --port without --nqn and --qid")
		}
		p, err := s.port(r.Port)
		if err == nil {
			p.Disconnect()
		}
		return Done{}, err
	}
	if r.NQN == "" {
		s.target.Faults().Disconnect(r.QID)
		return Done{}, nil
	}
	sub, err := s.one(r.NQN)
	switch {
	case err != nil:
		return Done{}, err
	case r.QID >= 0:
		return Done{}, exit.Errorf(exit.Usage, "a queue of one subsystem cannot be dropped; want --nqn or --qid")
	}
	sub.DropControllers()
	return Done{}, nil
}

func (s *server) stall(r StallRequest) (Done, error) {
	s.target.Faults().Stall(r.On)
	s.standing.Stalled = r.On
	return Done{}, nil
}

// maxPause is the longest time of a freeze, and of hidden namespaces.
const maxPause = time.Hour

func pause(milliseconds int64) (time.Duration, error) {
	if milliseconds < 0 || milliseconds > int64(maxPause/time.Millisecond) {
		return 0, exit.Errorf(exit.Usage, "%d ms; want 0 to %v", milliseconds, maxPause)
	}
	return time.Duration(milliseconds) * time.Millisecond, nil
}

func (s *server) freeze(r FreezeRequest) (Done, error) {
	d, err := pause(r.Milliseconds)
	if err == nil {
		s.target.Faults().Freeze(d)
	}
	return Done{}, err
}

func (s *server) hide(r HideRequest) (Done, error) {
	d, err := pause(r.Milliseconds)
	if err == nil {
		s.target.Faults().HideNamespaces(d)
	}
	return Done{}, err
}

func (s *server) addFault(r FaultRequest) (Done, error) {
	f, err := options.ParseFault(r.Fault)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "fault %q: %v; want %s", r.Fault, err, options.FaultWords)
	}
	s.lastFault++
	s.faults = append(s.faults, &fault{s.lastFault, r.Fault, s.target.Faults().Add(f)})
	return Done{ID: s.lastFault}, nil
}

func (s *server) unfault(r UnfaultRequest) (Done, error) {
	if r.ID == 0 {
		s.target.Faults().Clear()
		s.faults, s.standing = nil, Faults{}
		return Done{}, nil
	}
	i := slices.IndexFunc(s.faults, func(f *fault) bool { return f.id == r.ID })
	if i < 0 {
		return Done{}, exit.Errorf(exit.NotFound, "no fault %d", r.ID)
	}
	s.faults[i].added.Remove()
	s.faults = slices.Delete(s.faults, i, i+1)
	return Done{}, nil
}

func (s *server) reject(r RejectRequest) (Done, error) {
	reason := nvme.RDMARejectStatus(r.Status)
	if r.Status < 0 || reason > nvme.RDMARejectInvalidCNTLID {
		return Done{}, exit.Errorf(exit.Usage, "reject status %d; want 1 to %d, or 0 for none", r.Status, nvme.RDMARejectInvalidCNTLID)
	}
	s.target.Faults().RejectConnects(reason)
	s.standing.Reject = ""
	if reason != 0 {
		s.standing.Reject = reason.String()
	}
	return Done{}, nil
}

func (s *server) refuse(r RefuseRequest) (Done, error) {
	status := nvme.Status(r.Status)
	if r.Status < 0 || status.Code()|nvme.StatusDNR|status != nvme.StatusDNR|status.Code() {
		return Done{}, exit.Errorf(exit.Usage, "status %#x; want a status code type and code, and 0x4000 for dnr", r.Status)
	}
	s.target.Faults().FailConnects(status)
	s.standing.Refuse = ""
	if !status.OK() {
		s.standing.Refuse = status.FabricsString()
	}
	return Done{}, nil
}

func (s *server) ana(r ANARequest) (Done, error) {
	state, err := options.ParseANAState(r.State)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "%v", err)
	}
	found, err := s.named(r.NQN)
	if err != nil {
		return Done{}, err
	}
	set := func(sub *subsystem) error { return sub.SetANAState(r.Group, state) }
	key := strconv.Itoa(int(r.Group))
	if r.Port != 0 {
		port, err := s.port(r.Port)
		if err != nil {
			return Done{}, err
		}
		set = func(sub *subsystem) error { return sub.SetPortANAState(port, r.Group, state) }
		key += " over port " + strconv.Itoa(int(r.Port))
	}
	for _, sub := range found {
		if err := set(sub); err != nil {
			return Done{}, exit.Errorf(exit.Usage, "%v", err)
		}
		if r.Port == 0 { // it counts for all ports
			maps.DeleteFunc(sub.ana, func(other, _ string) bool { return strings.HasPrefix(other, key+" ") })
		}
		sub.ana[key] = r.State
	}
	return Done{}, nil
}
