package server

import (
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
)

// Status implements control.Controlled.
func (s *server) Status() control.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.opts
	out := control.Status{
		SchemaVersion: control.SchemaVersion, Name: s.record.state().Name, PID: os.Getpid(), Managed: systemd.Managed(),
		Transport: o.Transport, TrAddr: s.remote.Addr().String(), TrSvcID: strconv.Itoa(int(o.Port)),
		NQN: o.NQN, HostNQN: o.HostNQN, HostID: o.HostID.String(), HostIface: o.HostIface, Context: o.Context, Owner: o.Owner,
		State: "connecting", Frontend: s.front.name, FrontendReason: s.front.reason, Provider: s.provider.Name, ProviderReason: s.provider.Reason, QueueSize: o.QueueSize,
		KeepAlive: wholeSeconds(o.KeepAlive), Reconnect: wholeSeconds(o.Reconnect), Loss: wholeSeconds(o.Loss), FastFail: wholeSeconds(o.FastIOFail),
		TOS: int(o.TOS), PollMax: o.PollMax,
		Fence:   o.Fence,
		Devices: []control.Device{}, Lanes: []control.Lane{}, Outages: control.Outages{Losses: map[string]int{}},
	}
	if o.SourceAddr.IsValid() {
		out.HostTrAddr = o.SourceAddr.String()
	}
	if s.packets != nil {
		c := s.packets()
		out.Packets = &control.Packets{
			Sent: c.PacketsSent, Received: c.PacketsReceived, Retransmitted: c.Retransmits, Timeouts: c.Timeouts,
			OutOfSequence: c.OutOfSequence, Duplicates: c.Duplicates, NAKsSent: c.NAKsSent, NAKsReceived: c.NAKsReceived,
			RNRNAKs: c.RNRNAKs, BadICRC: c.BadICRC, Dropped: c.Malformed + c.UnknownQP + c.WrongAddress + c.StaleReads + c.Unsolicited + c.StaleMessages,
			Congestion: c.Marks + c.Notes,
			DroppedBy: map[string]uint64{
				"bad_icrc": c.BadICRC, "malformed": c.Malformed, "unknown_queue_pair": c.UnknownQP, "wrong_address": c.WrongAddress,
				"stale_read": c.StaleReads, "unsolicited": c.Unsolicited, "stale_message": c.StaleMessages,
			},
		}
	}
	switch {
	case o.ZeroCopy:
		out.ZeroCopy = "guests"
	case o.ShmemSocket != "":
		out.ZeroCopy = "users who share it"
	}
	if s.sub == nil {
		return out
	}
	now := s.sub.Info()
	if p := now.Paths[0]; p.Plan.Queues() > 0 {
		s.path = p
	}
	describeState(&out, now)
	describePath(&out, s.path)
	describePaths(&out, now, s.unready)
	out.ReservedBytes, out.RegisteredBytes, out.RegisteredLimit = now.Memory.Used, now.Memory.Registered, now.Memory.Limit
	out.RegionBytes = now.Memory.Regions
	if o.ZeroCopy {
		out.Places = places(now.Paths)
	}
	describeRequests(&out, now)
	for i, l := range s.loops {
		if i < len(out.Lanes) {
			addLoop(&out.Lanes[i], l.Snapshot())
		}
	}
	for _, v := range s.serving {
		if ended(v.dev) {
			continue
		}
		d := describeDevice(v)
		out.Devices = append(out.Devices, d)
		out.BufferBytes += d.BufferBytes
	}
	return out
}

// places returns in how many places the data of a command may be over each path that is connected, or 0
// if none is.
func places(paths []initiator.PathInfo) (n int) {
	for _, p := range paths {
		if p.Places > 0 && (n == 0 || p.Places < n) {
			n = p.Places
		}
	}
	return n
}

func ended(d device) bool {
	select {
	case <-d.Done():
		return true
	default:
		return false
	}
}

// timeFormat is the form of times in the status.
const timeFormat = time.RFC3339

func wholeSeconds(d time.Duration) int { return int(d / time.Second) }

// describeState fills in the present state of the subsystem.
func describeState(out *control.Status, now initiator.Info) {
	path := now.Paths[0]
	out.State, out.Losses, out.Attempts = now.State.String(), path.Losses, path.Attempts
	if !now.Since.IsZero() {
		out.Since = now.Since.UTC().Format(timeFormat)
	}
	if path.Reason != nil {
		out.Reason = path.Reason.Error()
	}
	if path.Failure != nil {
		out.Failure = path.Failure.Error()
	}
	for _, l := range now.Lanes {
		out.Lanes = append(out.Lanes, control.Lane{
			Submitted: l.Submitted, Completed: l.Completed, HandedOver: l.HandedOver, Retried: l.Retried,
		})
	}
}

// describePath fills in what is known of a controller since it was connected the last time.
func describePath(out *control.Status, connected initiator.PathInfo) {
	if connected.Address.IsValid() {
		out.TrAddr, out.TrSvcID = connected.Address.Addr().String(), strconv.Itoa(int(connected.Address.Port()))
		source := ""
		if connected.Source.IsValid() {
			source = connected.Source.String()
		}
		if source != out.HostTrAddr { // it is not the path that connect was given first
			out.HostTrAddr, out.HostIface = source, ""
		}
	}
	out.Authentication = connected.Auth
	out.CNTLID, out.Version = connected.CNTLID, connected.Version.String()
	out.Model, out.Serial, out.Firmware = connected.Model, connected.Serial, connected.Firmware
	out.RDMADevice, out.Memory = connected.Device, "registered"
	out.InCapsule, out.SQFlow, out.QueueSize = connected.InCapsule, connected.SQFlow, connected.QueueSize
	out.Queues = describeQueues(connected.Plan)
}

func describeQueues(p poller.Plan) control.Queues {
	class := func(c poller.Class) control.Class {
		return control.Class{Requested: p.RequestedOf(c), Granted: p.Count[c], Mapped: p.Mapped(c).String()}
	}
	return control.Queues{
		Requested: p.Requested.Total(), Granted: p.Granted,
		Read: class(poller.Read), Default: class(poller.Default), Poll: class(poller.Poll),
	}
}

func addLoop(out *control.Lane, s poller.Stats) {
	out.Passes, out.Enters, out.Waits, out.BlockingWaits, out.Spins = s.Passes, s.Enters, s.Waits, s.BlockingWaits, s.Spins
	out.Busy, out.Spin, out.Sleep = s.Busy.Seconds(), s.Spin.Seconds(), s.Sleep.Seconds()
}

// describeRequests fills in what became of requests, and of the time that they took.
func describeRequests(out *control.Status, now initiator.Info) {
	out.Requests.Oldest = now.Oldest.Seconds()
	for _, l := range now.Lanes {
		// The lanes go on while they are looked at.
		out.Requests.InFlight += max(0, int64(l.Submitted-l.Completed))
		out.Requests.Held += l.Held
	}
	out.Outages = control.Outages{
		Unavailable: now.Outages.Time.Seconds(), Attempts: now.Outages.Attempts, Reconnects: now.Outages.Made,
		Losses: map[string]int{},
	}
	for reason, n := range now.Outages.Losses {
		out.Outages.Losses[reason.String()] = n
	}
	for _, b := range initiator.DurationBounds() {
		out.DurationBounds = append(out.DurationBounds, b.Seconds())
	}
	out.Stages = map[string]map[string]control.Durations{}
	for s := range now.Stages {
		out.Stages[initiator.Stage(s).String()] = describeDurations(&now.Stages[s])
	}
}

// describeDurations names the operations of which a request was timed.
func describeDurations(all *initiator.OpHistograms) map[string]control.Durations {
	out := map[string]control.Durations{}
	for op := range all {
		if h := &all[op]; h.Count() > 0 {
			out[strings.ReplaceAll(block.Op(op).String(), "-", "_")] = control.Durations{Buckets: h.Buckets[:], Sum: h.Sum.Seconds()}
		}
	}
	return out
}

func describeDevice(v *serving) control.Device {
	g, q := v.device.Geometry(), v.dev.Queues()
	out := control.Device{
		Device: v.dev.Record().Name(), NSID: v.nsid, UUID: v.uuid,
		Size: g.Sectors << block.SectorShift, BlockSize: g.LogicalBlock, ReadOnly: g.ReadOnly, WriteCache: g.VolatileCache,
		Queues: q.Queues, QueueDepth: q.Depth, MaxIO: q.MaxIO,
		BufferBytes: q.Queues * q.Depth * q.MaxIO,
		Counters:    countersOf(v.dev.Snapshot()),
	}
	if d, ok := v.dev.(*vhostDevice); ok {
		out.User = d.srv.Front()
	}
	if v.used != nil {
		used := v.used()
		out.Used = &used
	}
	if v.timed != nil {
		d := v.timed.Durations()
		out.Present, out.Durations = v.timed.Present(), describeDurations(&d)
		out.Wait = describeWait(v.timed.Wait())
	}
	return out
}

// describeWait says why requests are not sent, if they are not.
func describeWait(w initiator.Wait, waits bool) *control.Wait {
	if !waits {
		return nil
	}
	out := control.Wait{Since: w.Since.UTC().Format(timeFormat), Reason: w.Reason}
	if w.Left != initiator.Forever {
		left := int64(math.Ceil(w.Left.Seconds()))
		out.FailIn = &left
	}
	return &out
}

// countersOf writes the counters of a device down.
func countersOf(n block.Stats) control.IO {
	return control.IO{
		Reads: n.Reads, Writes: n.Writes, ReadBytes: n.ReadBytes, WrittenBytes: n.WrittenBytes, DirectBytes: n.DirectBytes,
		Flushes: n.Flushes, Discards: n.Discards, WriteZeroes: n.WriteZeroes, Errors: n.Errors, Batches: n.Batches,
		Failed: control.Failures(n.Failed),
	}
}
