package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/ublk"
)

// A server takes over from another server that died (connect and recover) or that leaves
// (upgrade). It connects, makes the other server leave, waits until the target has ended
// all controllers of the other server, and checks that each namespace is the one for
// which its device was made. Only then does it serve the devices. Until it serves all of
// them, the record stays as the other server left it, except for the process and for
// controllers that are added.

// take takes a new name, or the name of a dead server together with its devices.
func (s *server) take(ctx context.Context) error {
	var e *state.Entry
	var err error
	switch {
	case s.cfg.Again:
		e, err = s.cfg.Dir.AdoptAgain(ctx, s.cfg.Recovers)
	case s.cfg.Recovers != "":
		e, err = s.cfg.Dir.Adopt(ctx, s.cfg.Recovers)
	default:
		e, err = s.cfg.Dir.Reserve(ctx, s.target(), s.cfg.Args, s.opts.Duplicate)
	}
	if dup := (*state.DuplicateError)(nil); errors.As(err, &dup) {
		return alreadyConnected(ctx, dup)
	}
	if errors.Is(err, os.ErrNotExist) && s.cfg.Recovers != "" {
		return exit.Errorf(exit.NotFound, "there is no record of %s any more", s.cfg.Recovers)
	}
	if err != nil {
		return err
	}
	s.record = newRecord(e, s.keepAlive())
	if e.Inherited {
		s.waiting = e.Devices
	}
	return nil
}

// logTaken logs the findings of take. It is called when there is a log.
func (s *server) logTaken() {
	e := s.record.entry
	for _, unread := range e.Unreadable {
		s.log.Warn("cannot read a server's record, so its devices are unknown", "error", unread)
	}
	s.warnOfOtherHosts()
	if e.Inherited {
		s.log.Info("taking over from a dead server", "server", e.Name, "devices", len(e.Devices), "controllers", fmt.Sprint(e.Controllers))
	}
}

// alreadyConnected returns an error that says what to do about the server that is
// connected to the target. A server whose controller was given up stays until its
// devices are ended.
func alreadyConnected(ctx context.Context, dup *state.DuplicateError) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	r := dup.Record
	status, err := control.NewClient(r.Socket()).Status(ctx)
	if err == nil && status.State == initiator.StateDead.String() {
		return exit.Errorf(exit.AlreadyServed, "%s served %s and gave it up (%s); disconnect %s ends its devices, and then connect works",
			r.Name, r.Target.NQN, status.Reason, r.Name)
	}
	return exit.Errorf(exit.AlreadyServed, "already connected: %v; --duplicate-connect allows another", dup)
}

// warnOfOtherHosts logs the dead servers of the subsystem that had another host NQN. The
// target would not tell this host whether their controllers have ended.
func (s *server) warnOfOtherHosts() {
	others, err := s.keptBy(func(r state.Record) bool {
		return r.Target.NQN == s.opts.NQN && r.Target.HostNQN != s.opts.HostNQN && len(r.Controllers) > 0
	})
	if err != nil {
		s.log.Warn("cannot read the records of other servers", "error", err)
	}
	for _, r := range others {
		s.log.Warn("a dead server of the same subsystem had another host NQN; the target may still execute its writes, and this host cannot find out",
			"server", r.Name, "hostnqn", r.Target.HostNQN)
	}
}

// succeed prepares to replace a running server, which has yet to be asked to leave.
func (s *server) succeed() error {
	r, err := s.cfg.Dir.Find(s.cfg.Succeeds)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && !r.Alive:
		return exit.Errorf(exit.NotFound, "%s does not run", s.cfg.Succeeds)
	case err != nil:
		return err
	}
	s.record, s.waiting = copyOf(r, s.keepAlive()), r.Devices
	return nil
}

// relieve makes the running server leave and takes over its record.
func (s *server) relieve(ctx context.Context) error {
	r := s.record.entry.Record
	p, err := r.Process.Open()
	if err == nil {
		defer p.Close()
		limit, cancel := context.WithTimeout(ctx, leaveTime)
		defer cancel()
		s.log.Info("taking over from a running server", "server", r.Name, "process", r.Process.PID)
		defer s.announceWait(leaveTime, "process %d has left its devices", r.Process.PID)()
		sessions := receiveSessions(r, s.log)
		refused := control.NewClient(r.Socket()).HandOver(limit, sessions.path())
		defer func() { s.handed = sessions.end() }()
		if e := (*exit.Error)(nil); errors.As(refused, &e) {
			return fmt.Errorf("the running server does not hand over: %w", refused)
		}
		if err := p.Wait(limit); err != nil {
			return errors.Join(fmt.Errorf("wait for the end of process %d: %w", r.Process.PID, err), refused)
		}
	} else if !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	e, err := s.cfg.Dir.Adopt(ctx, r.Name)
	if err != nil {
		return err
	}
	s.waiting = e.Devices
	if err := s.record.become(e); err != nil {
		return err
	}
	return s.listen()
}

// keepAlive returns the keep alive timeout of this server's controllers.
func (s *server) keepAlive() time.Duration {
	return cmp.Or(s.opts.KeepAlive, initiator.DefaultKeepAlive)
}

// outliveMargin is added to the time within which the target ends controllers. It is
// for requests to the target and for a new association if one is needed.
const outliveMargin = 10 * time.Second

// announceWait tells the command that started this server what the server waits for,
// and how long at most. The caller must call over when the wait has ended.
func (s *server) announceWait(limit time.Duration, format string, args ...any) (over func()) {
	what := "waits until " + fmt.Sprintf(format, args...)
	s.notify(systemd.Status(what), systemd.ExtendTimeout(limit+s.opts.Timeout+stopTime))
	if s.cfg.Waiting == nil {
		return func() {}
	}
	s.cfg.Waiting(Wait{For: what, Seconds: int(limit.Round(time.Second) / time.Second)})
	return func() { s.cfg.Waiting(Wait{}) }
}

// outlive waits until the target has ended the controllers of earlier servers. The time
// limit is derived from the keep alive timeouts, not from the time limit for
// connecting. waited is false if there are no such controllers.
func (s *server) outlive(ctx context.Context) (waited bool, err error) {
	earlier, keepAlive := s.record.earlier()
	if len(earlier) == 0 {
		return false, nil
	}
	limit := s.sub.OutliveTime(keepAlive, len(earlier)) + outliveMargin
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline))
	}
	shown := limit.Round(time.Second)
	s.log.Info("waiting until the target has ended the controllers of earlier servers", "controllers", fmt.Sprint(earlier), "at_most", shown)
	over := s.announceWait(limit, "the target has ended the controllers of the earlier server, made at %s", s.whereMade(earlier))
	limited, stop := context.WithTimeout(ctx, limit)
	defer stop()
	defer over()
	leaving, enough := context.WithCancel(limited)
	left := s.leaveForDead(leaving)
	defer left.Wait()
	defer enough()
	var ids []initiator.ControllerID
	for _, c := range earlier {
		ids = append(ids, initiator.ControllerID(c))
	}
	if err := s.sub.Outlive(limited, keepAlive, ids...); err != nil {
		return true, fmt.Errorf("the target still has a controller of an earlier server, made at %s, or does not say (waited up to %v); try again later: %w", s.whereMade(earlier), shown, err)
	}
	return true, s.record.outlived(ctx)
}

// leaveForDead ends the connections of a dead server to the target, which otherwise notices its death
// only when the keep alive timer expires. The target is asked all the same whether it has ended the
// controllers. leaveForDead does not wait.
func (s *server) leaveForDead(ctx context.Context) *sync.WaitGroup {
	var all sync.WaitGroup
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.providers {
		leaver, ok := p.rdma.(rdma.Leaver)
		if !ok {
			continue
		}
		for _, trace := range s.record.leftBehind() {
			all.Go(func() {
				if err := leaver.Leave(ctx, trace); err != nil {
					s.log.Debug("connection of a dead server was not ended", "error", err)
				}
			})
		}
	}
	return &all
}

// whereMade lists the addresses at which controllers were made.
func (s *server) whereMade(all []state.Controller) string {
	var words []string
	for _, c := range all {
		at := c.Address
		if !at.IsValid() {
			at = s.remote // an older build did not record it
		}
		if !slices.Contains(words, at.String()) {
			words = append(words, at.String())
		}
	}
	return strings.Join(words, " and ")
}

// namespaceWait is the longest wait for the missing namespace of a device. A target
// that restarts may open its port before its namespaces exist. Tests shorten it.
var namespaceWait = 10 * time.Second

// awaitNamespaces waits for the namespaces of all devices to take over, and returns all
// namespaces that exist then.
func (s *server) awaitNamespaces(ctx context.Context, found []namespace) []namespace {
	ctx, cancel := context.WithTimeout(ctx, namespaceWait)
	defer cancel()
	defer s.tell() // for changes that were reported meanwhile
	for said := false; ; said = true {
		found = s.withAdded(found)
		missing := slices.IndexFunc(s.waiting, func(d state.Device) bool {
			return !slices.ContainsFunc(found, func(n namespace) bool { return n.nsid == d.NSID })
		})
		if missing < 0 {
			return found
		}
		if !said {
			defer s.announceWait(namespaceWait, "the target has namespace %d", s.waiting[missing].NSID)()
			s.log.Info("waiting for a namespace", "nsid", s.waiting[missing].NSID, "device", s.waiting[missing].Path(), "at_most", namespaceWait)
		}
		select {
		case <-s.news:
		case <-ctx.Done():
			return found
		}
	}
}

// withAdded returns found with the namespaces that were added since, and without those
// that were removed.
func (s *server) withAdded(found []namespace) []namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.reported {
		isIt := func(n namespace) bool { return n.device == c.device }
		switch c.what {
		case initiator.Added:
			if !slices.ContainsFunc(found, isIt) {
				found = append(found, c.namespace)
			}
		case initiator.Removed:
			found = slices.DeleteFunc(found, isIt)
		}
	}
	return found
}

// heirloom is a device of another server, with the namespace that will serve it.
type heirloom struct {
	state.Device
	namespace
}

// recordWith returns the new record of the device. Users still see the old properties,
// except for the size, unless they connect again.
func (h heirloom) recordWith(now state.Device) state.Device {
	if h.Kind == state.NBDSocket || h.Told == (state.Told{}) {
		return now
	}
	size := now.Told.Size
	now.Told = h.Told
	now.Told.Size = size
	return now
}

// recoverDevices takes over the devices of another server and returns their new records.
// It leaves out devices that ended together with the other server.
func (s *server) recoverDevices(ctx context.Context, found []namespace) ([]state.Device, error) {
	var all []heirloom
	for _, w := range s.waiting {
		gone, err := s.back.gone(ctx, w, Keep)
		if err != nil {
			return nil, err
		}
		if gone {
			s.log.Warn("device is gone", "device", w.Path(), "nsid", w.NSID)
			continue
		}
		ns, err := s.heirOf(w, found)
		if err != nil {
			return nil, err
		}
		all = append(all, heirloom{w, ns})
	}
	var devices []state.Device
	s.recovering = len(all) > 0
	defer s.dropSessions()
	for i, h := range all {
		d, err := s.recoverDevice(ctx, h, i > 0)
		if err != nil {
			return nil, fmt.Errorf("namespace %d: %w", h.nsid, err)
		}
		s.addServing(h.namespace, d)
		devices = append(devices, h.recordWith(s.recordOf(h.namespace, d)))
		if h.device.Geometry().ReadOnly != h.Told.ReadOnly {
			s.changed(h.namespace, initiator.WriteProtection)
		}
	}
	return devices, nil
}

// leaveWaiting ends a server that could not take over all devices. A device whose
// takeover has begun is released only by the end of the process. If no takeover has
// begun, no I/O has been sent. Then the server shuts down its controller, so that the
// next server need not wait for it.
func (s *server) leaveWaiting(ctx context.Context) error {
	if s.recovering {
		return nil
	}
	if err := s.endBelow(ctx, orderly); err != nil {
		s.log.Warn("server ended, but not all its parts did", "error", err)
		return nil
	}
	return s.record.left()
}

// heirOf returns the namespace for which a device was made, in its present state.
func (s *server) heirOf(d state.Device, found []namespace) (namespace, error) {
	i := slices.IndexFunc(found, func(n namespace) bool { return n.nsid == d.NSID })
	if i < 0 {
		return namespace{}, exit.Errorf(exit.NotFound, "%s: subsystem %s has %s, not namespace %d", d.Path(), s.opts.NQN, s.nsids(found), d.NSID)
	}
	ns := found[i]
	if err := sameNamespace(d, ns); err != nil {
		return ns, fmt.Errorf("%s cannot be recovered: namespace %d %w; disconnect removes the device", d.Path(), d.NSID, err)
	}
	if d.UUID == "" && d.NGUID == "" && d.EUI64 == "" {
		s.log.Warn("namespace has no identifier; only its sizes show that the device was made for it", "device", d.Path(), "nsid", d.NSID)
	}
	return ns, nil
}

// sameNamespace returns an error if a namespace is not, or may not be, the one for
// which a device was made. The rules are those after the loss of an association: both
// must have an identifier in common, and no identifier may differ. Without any
// identifier, number and size must be equal. The error text is the predicate of a
// sentence.
func sameNamespace(d state.Device, ns namespace) error {
	known := false
	for _, id := range []struct{ name, was, now string }{
		{"UUID", d.UUID, ns.uuid}, {"NGUID", d.NGUID, ns.nguid}, {"EUI64", d.EUI64, ns.eui64},
	} {
		switch {
		case id.was == "" || id.now == "":
		case id.was == id.now:
			known = true
		default:
			return fmt.Errorf("had %s %s and has %s now", id.name, id.was, id.now)
		}
	}
	none := d.UUID+d.NGUID+d.EUI64+ns.uuid+ns.nguid+ns.eui64 == ""
	complete := d.Told != state.Told{} // older versions recorded only the UUID
	if !known && !none && (complete || d.UUID != "") {
		return errors.New("has no identifier in common with the namespace for which the device was made")
	}
	if !complete {
		return nil
	}
	g := ns.device.Geometry()
	if g.LogicalBlock != d.Told.BlockSize {
		return fmt.Errorf("had blocks of %d bytes and has %d now", d.Told.BlockSize, g.LogicalBlock)
	}
	if size := g.Sectors << block.SectorShift; none && size != d.Told.Size {
		return fmt.Errorf("has no identifier, had %d bytes and has %d now", d.Told.Size, size)
	}
	return nil
}

// dropSessions hangs up the front ends of devices that were not taken over.
func (s *server) dropSessions() {
	for _, x := range s.handed {
		if err := x.Close(); err != nil {
			s.log.Warn("cannot hang up a front end", "error", err)
		}
	}
	s.handed = nil
}

// recoverDevice takes over a device. later is set if the loops have already served
// another device.
func (s *server) recoverDevice(ctx context.Context, h heirloom, later bool) (device, error) {
	switch h.Kind {
	case state.NBDSocket:
		return s.export(ctx, h.namespace, -1)
	case state.VhostUserBlk:
		session := s.handed[h.Socket]
		delete(s.handed, h.Socket)
		return s.serveVhost(h.namespace, h.Socket, session)
	}
	info, err := s.back.get(ctx, h.ID)
	if err != nil {
		return nil, err
	}
	if info.Cookie != h.Cookie {
		return nil, fmt.Errorf("%s: %w", h.Path(), ublk.ErrNotOurs)
	}
	cfg := ublk.Config{Device: h.device, Loops: s.loops, KeepAffinity: later, Log: s.log}
	if h.Shared != nil {
		cfg.Shared = ublk.SharedMemory{Device: h.Shared.Device, Inode: h.Shared.Inode, Size: h.Shared.Size}
	}
	d, err := s.back.recover(ctx, info, cfg)
	if err != nil {
		return nil, err
	}
	with, err := s.sharing(h.nsid, d, h.Socket)
	if err != nil { // the device is more important
		s.log.Error("no shared memory is taken", "device", h.Path(), "error", err)
		return d, nil
	}
	return with, nil
}
