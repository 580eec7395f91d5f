package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

// record is the server's entry in the run directory. Any goroutine may call its methods.
type record struct {
	mu    sync.Mutex // guards what follows
	entry *state.Entry
	// own is set if the entry is this server's. Before that, the entry is a copy of the
	// record of a running server and is not saved.
	own bool
	// inherited is set if the entry was another server's and this server does not serve
	// all of its devices yet. Such an entry is never removed.
	inherited bool
	// before holds the controllers of earlier servers that the target may still have,
	// and used the controllers of this server that may have received I/O.
	before, used []state.Controller
	newest       state.Controller // controller of this server that the target made last
	// keepAliveBefore is the longest keep alive timeout of before, keepAlive that of
	// used, in seconds.
	keepAliveBefore, keepAlive int
	// orphaned holds the traces of the connections of the earlier servers, connections those of
	// this one (rdma.Traced).
	orphaned, connections []string
	// finished is set when the target has ended all commands of this server.
	finished bool
}

func newRecord(e *state.Entry, keepAlive time.Duration) *record {
	r := &record{
		entry: e, own: true, inherited: e.Inherited, before: e.Controllers,
		keepAliveBefore: e.KeepAlive, keepAlive: int(keepAlive / time.Second),
	}
	r.orphaned, _ = e.Connections() // if this fails, the target notices the death later
	return r
}

// copyOf returns a copy of the record of a running server, for its replacement.
func copyOf(r state.Record, keepAlive time.Duration) *record {
	return &record{
		entry: &state.Entry{Record: r}, before: r.Controllers,
		keepAliveBefore: r.KeepAlive, keepAlive: int(keepAlive / time.Second),
	}
}

// become takes over the entry of a predecessor that has ended.
func (r *record) become(e *state.Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	own, known := r.entry.Made[r.newest]
	r.entry, r.own, r.inherited, r.before, r.keepAliveBefore = e, true, true, e.Controllers, e.KeepAlive
	r.orphaned, _ = e.Connections()
	_ = r.saveConnections()
	if last, ok := e.Made[r.newest]; known && (last.Before(own) || !ok && !slices.Contains(e.Controllers, r.newest)) {
		r.setMade(r.newest, own)
	}
	return r.save()
}

// save writes the entry, if it is this server's. The caller holds mu.
func (r *record) save() error {
	r.entry.Controllers, r.entry.Earlier = state.Distinct(slices.Concat(r.before, r.used)), r.before
	r.entry.Made = maps.Clone(r.entry.Made)
	maps.DeleteFunc(r.entry.Made, func(c state.Controller, _ state.Made) bool {
		return c != r.newest && !slices.Contains(r.entry.Controllers, c)
	})
	r.entry.KeepAlive = max(r.keepAliveBefore, r.keepAlive)
	if !r.own {
		return nil
	}
	return r.entry.Save()
}

// update changes the state and saves it. After an error the change is kept in memory,
// and the next successful update saves it.
func (r *record) update(change func(*state.State)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.entry.State)
	return r.save()
}

// made records a controller that the target has made for this server, and returns when
// the controllers of the record were made. If another controller of the record had the
// same id at the same address, the target has ended it.
func (r *record) made(cntlid uint16, m state.Made) map[state.Controller]state.Made {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.newest = state.Controller{CNTLID: cntlid, Address: m.Address}
	r.setMade(r.newest, m)
	_ = r.save() // if this fails, the next server may wait longer
	return r.entry.Made
}

// setMade replaces the map by a changed copy, because callers of made keep the map. The
// caller holds mu.
func (r *record) setMade(c state.Controller, m state.Made) {
	r.entry.Made = maps.Clone(r.entry.Made)
	if r.entry.Made == nil {
		r.entry.Made = map[state.Controller]state.Made{}
	}
	r.entry.Made[c] = m
}

// lastMade returns when the last controller of the record with this name was made.
func (r *record) lastMade(c state.Controller) (state.Made, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, known := r.entry.Made[c]
	return m, known
}

// associated records the controllers that have commands of this server or are about to
// receive them, for the next server. It forgets all others, which the target has ended by
// then. The id of such a one may now belong to a controller of another server, and the next
// server must not wait for its end.
func (r *record) associated(all []initiator.ControllerID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.used
	r.used = nil
	for _, id := range all {
		r.used = append(r.used, state.Controller(id))
	}
	if err := r.save(); err != nil {
		r.used = last
		return err
	}
	return nil
}

// connected records the connections of this server. If that fails, the target only learns later that
// this server has died.
func (r *record) connected(traces []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.connections = traces
	_ = r.saveConnections()
}

// saveConnections writes the connections that the next server must end. The caller holds mu.
func (r *record) saveConnections() error {
	all := r.connections
	if len(r.before) > 0 {
		all = slices.Concat(r.orphaned, all)
	}
	if !r.own || len(all) == 0 {
		return nil
	}
	return r.entry.SaveConnections(all)
}

// leftBehind returns the connections of the server that had the record before.
func (r *record) leftBehind() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.orphaned
}

// earlier returns the controllers of earlier servers that the target may still have, and
// their longest keep alive timeout.
func (r *record) earlier() (all []state.Controller, keepAlive time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.before), time.Duration(r.keepAliveBefore) * time.Second
}

// outlived records that the target has ended the controllers of earlier servers, also in
// those servers' records that stay.
func (r *record) outlived(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ended := r.before
	r.before, r.orphaned, r.keepAliveBefore = nil, nil, 0
	_ = r.saveConnections() // the next server must not end those of the earlier ones again
	if err := r.save(); err != nil {
		return err
	}
	return r.entry.Forget(ctx, ended)
}

// finish records whether the target has ended all commands of this server.
func (r *record) finish(finished bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finished = finished
}

// left records that this server has left the target, if it has. The record stays for
// the next server.
func (r *record) left() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.finished {
		return nil
	}
	r.used = nil
	return r.save()
}

// takenOver records that a server with these flags, keys and this target serves all devices
// of an inherited record.
func (r *record) takenOver(target state.Target, args []string, secrets state.Secrets, devices []state.Device) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.entry.SaveSecrets(secrets); err != nil {
		return err
	}
	r.entry.Target, r.entry.Args, r.entry.Devices, r.entry.Phase = target, args, devices, state.Live
	if err := r.save(); err != nil {
		return err
	}
	r.inherited = false
	return nil
}

// changeSecrets records the keys of a connection that was authenticated with them.
func (r *record) changeSecrets(secrets state.Secrets) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entry.SaveSecrets(secrets)
}

// secrets returns the recorded keys.
func (r *record) secrets() (state.Secrets, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entry.Secrets()
}

// retire removes the record, unless one of its devices remains or another server needs
// it.
func (r *record) retire(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.own || r.inherited || len(r.entry.Devices) > 0 {
		return nil
	}
	unfinished := r.before
	if !r.finished {
		unfinished = state.Distinct(slices.Concat(r.before, r.used))
	}
	return r.entry.Retire(ctx, unfinished)
}

func (r *record) isOwn() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.own
}

// state returns a copy of the recorded state.
func (r *record) state() state.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.entry.State
	s.Devices = slices.Clone(s.Devices)
	return s
}

// socket returns the path of the control socket.
func (r *record) socket() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entry.Socket()
}

// addDevices records devices.
func (r *record) addDevices(all ...state.Device) error {
	return r.update(func(s *state.State) { s.Devices = append(s.Devices, all...) })
}

// removeDevices removes devices that have ended from the record.
func (r *record) removeDevices(all ...state.Device) error {
	return r.update(func(s *state.State) {
		s.Devices = slices.DeleteFunc(slices.Clone(s.Devices), func(have state.Device) bool {
			return slices.ContainsFunc(all, func(d state.Device) bool { return sameDevice(d, have) })
		})
	})
}

// share records the shared memory of the device with this socket; nil: none.
func (r *record) share(socket string, m *state.SharedMemory) error {
	found := false
	err := r.update(func(s *state.State) {
		s.Devices = slices.Clone(s.Devices)
		for i := range s.Devices {
			if s.Devices[i].Socket == socket {
				s.Devices[i].Shared, found = m, true
			}
		}
	})
	if err == nil && !found {
		err = fmt.Errorf("no device on record has the socket %s", socket)
	}
	return err
}

// sameDevice reports whether two records describe the same device.
func sameDevice(a, b state.Device) bool {
	return a.Kind == b.Kind && a.ID == b.ID && a.Cookie == b.Cookie && a.URI == b.URI && a.Socket == b.Socket
}
