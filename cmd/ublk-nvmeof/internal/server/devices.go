package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/ublk"
)

// undoTime limits the time to end a new device that cannot be served.
const undoTime = 5 * time.Second

// startDevices makes one device per namespace, all on the same loops. It records each
// device before it makes the next.
func (s *server) startDevices(ctx context.Context, chosen []namespace) error {
	if err := s.checkMemory(chosen); err != nil {
		return err
	}
	if s.front.name == options.NBDSocket {
		if err := s.startExports(ctx, chosen...); err != nil {
			return err
		}
		chosen = nil
	}
	for i, ns := range chosen {
		id := s.opts.Device
		if id != options.AutoDevice {
			id += i
		}
		if err := s.startDevice(ctx, ns, id, i > 0); err != nil {
			return fmt.Errorf("namespace %d: %w", ns.nsid, err)
		}
	}
	if err := s.record.update(func(r *state.State) { r.Phase = state.Live }); err != nil {
		return err
	}
	s.acceptClients()
	return nil
}

// startDevice makes the device of a namespace. later is set if the loops have already
// served a device. A device that cannot be recorded is not served.
func (s *server) startDevice(ctx context.Context, ns namespace, id int, later bool) error {
	if s.front.name == options.NBDSocket {
		return s.startExports(ctx, ns)
	}
	d, err := s.makeDevice(ctx, ns, id, later)
	if err != nil {
		return err
	}
	if err := s.record.addDevices(s.recordOf(ns, d)); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		if serr := d.Stop(undo, true); serr != nil {
			s.addServing(ns, d) // the device exists, and ends with the server
			return errors.Join(err, serr)
		}
		return errors.Join(err, s.record.removeDevices(s.recordOf(ns, d)))
	}
	s.addServing(ns, d)
	// udev may have looked for the record before it existed.
	if err := s.back.uevent(d.Record().Name()); err != nil {
		s.log.Warn("udev is not told of the device's names", "device", d.Record().Path(), "error", err)
	}
	return nil
}

// startExports makes an export of the socket for each namespace. It records all of them
// before a client can use one.
func (s *server) startExports(ctx context.Context, chosen ...namespace) error {
	if err := s.openNBD(); err != nil {
		return err
	}
	var records []state.Device
	for _, ns := range chosen {
		records = append(records, s.described(ns, s.nbd.exportOf(ns, s.opts.NQN).record))
	}
	if err := s.record.addDevices(records...); err != nil {
		return errors.Join(err, s.record.removeDevices(records...))
	}
	for i, ns := range chosen {
		d, err := s.export(ctx, ns, -1)
		if err != nil {
			return errors.Join(fmt.Errorf("namespace %d: %w", ns.nsid, err), s.record.removeDevices(records[i:]...))
		}
		s.addServing(ns, d)
	}
	return nil
}

// makeDevice makes the block device of a namespace. It does not take a number that the
// record of a dead server names.
func (s *server) makeDevice(ctx context.Context, ns namespace, id int, later bool) (device, error) {
	kind := state.Ublk
	if s.front.name == options.NBD {
		kind = state.NBD
	}
	if s.front.name == options.VhostUserBlk {
		return s.serveVhost(ns, "", nil)
	}
	start := func(id int) (device, error) {
		if kind == state.NBD {
			return s.export(ctx, ns, id)
		}
		d, err := s.back.start(ctx, ublk.Config{
			ID: id, Device: ns.device, Loops: s.loops, Depth: s.depth, MaxIO: s.opts.MaxIO,
			Recovery: policies[s.opts.OnCrash], KeepAffinity: later, Log: s.log, ShareMemory: s.opts.ShmemSocket != "",
		})
		if err != nil {
			return nil, err
		}
		with, err := s.sharing(ns.nsid, d, "")
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
			defer cancel()
			return nil, errors.Join(err, d.Stop(undo, true))
		}
		return with, nil
	}
	kept, err := s.keptNumbers(kind)
	if err != nil {
		return nil, err
	}
	if id != options.AutoDevice {
		if r, ok := kept[id]; ok {
			return nil, errKept(state.Device{Kind: kind, ID: id}.Path(), r)
		}
		return start(id)
	}
	if len(kept) == 0 {
		return start(id)
	}
	// The driver does not know which numbers are kept.
	for id := range maxTried {
		if _, ok := kept[id]; ok {
			continue
		}
		d, err := start(id)
		if errors.Is(err, ublk.ErrIDTaken) || errors.Is(err, nbd.ErrTaken) {
			continue
		}
		return d, err
	}
	return nil, fmt.Errorf("no device number below %d is free: %w", maxTried, ublk.ErrIDTaken)
}

// maxTried is the number of device numbers that makeDevice tries.
const maxTried = 4096

var policies = map[string]ublk.RecoveryPolicy{
	options.Requeue: ublk.RecoveryRequeue, options.Fail: ublk.RecoveryFail, options.Remove: ublk.RecoveryNone,
}

// acceptClients lets clients of all sockets in. The caller has recorded everything that
// clients may use and has made its devices.
func (s *server) acceptClients() {
	for _, v := range s.devices() {
		v.dev.Accept()
	}
}

// addServing adds a device to the served devices and watches it.
func (s *server) addServing(ns namespace, d device) {
	v := &serving{namespace: ns, dev: d}
	s.mu.Lock()
	s.serving = append(s.serving, v)
	s.mu.Unlock()
	go s.mind(v)
}

// mind waits for the end of a device. The server ends when its last device ends by
// itself.
func (s *server) mind(v *serving) {
	<-v.dev.Done()
	if err := v.dev.Err(); err != nil {
		s.log.Error("device has ended", "device", v.dev.Record().Path(), "error", err)
	}
	for _, w := range s.devices() {
		if !ended(w.dev) {
			return
		}
	}
	if v.dev.Err() != nil {
		s.idle.Do(func() { close(s.noDevice) })
	}
}

// recordOf returns the record of a device.
func (s *server) recordOf(ns namespace, d device) state.Device { return s.described(ns, d.Record()) }

// described adds to the record of a device what the device is.
func (s *server) described(ns namespace, d state.Device) state.Device {
	r := describeRecord(ns, d)
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Model, r.Serial = s.path.Model, s.path.Serial
	return r
}

// describeRecord adds to the record of a device the identity of its namespace and the
// properties that its users see.
func describeRecord(ns namespace, d state.Device) state.Device {
	g := ns.device.Geometry()
	d.NSID, d.UUID, d.NGUID, d.EUI64 = ns.nsid, ns.uuid, ns.nguid, ns.eui64
	d.Told = state.Told{
		Size: g.Sectors << block.SectorShift, BlockSize: g.LogicalBlock, MaxIO: g.MaxIO,
		MaxDiscard: uint64(g.MaxDiscardSectors) << block.SectorShift, MaxZeroes: uint64(g.MaxZeroesSectors) << block.SectorShift,
		VolatileCache: g.VolatileCache, ReadOnly: g.ReadOnly,
	}
	return d
}

// keptBy returns the records of other dead servers, which may still be recovered.
func (s *server) keptBy(has func(state.Record) bool) ([]state.Record, error) {
	records, err := s.cfg.Dir.Others(s.record.state().Name)
	if err != nil {
		return nil, err
	}
	var kept []state.Record
	for _, r := range records {
		if r.Err == nil && !r.Alive && has(r) {
			kept = append(kept, r)
		}
	}
	return kept, nil
}

// keptNumbers returns the device numbers of dead servers, which users may still know.
func (s *server) keptNumbers(kind state.Kind) (map[int]state.Record, error) {
	kept := map[int]state.Record{}
	records, err := s.keptBy(func(r state.Record) bool { return len(r.Devices) > 0 })
	for _, r := range records {
		for _, d := range r.Devices {
			if d.Kind == kind {
				kept[d.ID] = r
			}
		}
	}
	return kept, err
}

// errKept returns the error for a number or an address that a dead server keeps.
func errKept(what string, r state.Record) error {
	return exit.Errorf(exit.DeviceTaken, "%s belongs to %s, which served %s and died; recover takes it over, disconnect %s gives it up",
		what, r.Name, r.Target.NQN, r.Name)
}
