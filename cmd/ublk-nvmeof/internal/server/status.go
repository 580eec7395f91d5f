package server

import (
	"os"
	"strconv"
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
		NQN: o.NQN, HostNQN: o.HostNQN, HostID: o.HostID.String(),
		State: "connecting", Frontend: s.front.name, FrontendReason: s.front.reason, Provider: s.provider.Name, ProviderReason: s.provider.Reason, QueueSize: o.QueueSize,
		KeepAlive: wholeSeconds(o.KeepAlive), Reconnect: wholeSeconds(o.Reconnect), Loss: wholeSeconds(o.Loss), FastFail: wholeSeconds(o.FastIOFail),
		TOS: int(o.TOS), PollMax: o.PollMax,
		Devices: []control.Device{}, Lanes: []control.Lane{},
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
		}
	}
	if s.ctrl == nil {
		return out
	}
	now := s.ctrl.Info()
	if now.Plan.Queues() > 0 {
		s.info = now
	}
	describeController(&out, now, s.info)
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

func ended(d device) bool {
	select {
	case <-d.Done():
		return true
	default:
		return false
	}
}

func wholeSeconds(d time.Duration) int { return int(d / time.Second) }

// describeController fills in the present state of the controller. While the controller
// is not connected, the details are those of its last connection.
func describeController(out *control.Status, now, connected initiator.Info) {
	out.State, out.Losses, out.Attempts = now.State.String(), now.Losses, now.Attempts
	if !now.Since.IsZero() {
		out.Since = now.Since.UTC().Format(time.RFC3339)
	}
	if now.Reason != nil {
		out.Reason = now.Reason.Error()
	}
	if now.Failure != nil {
		out.Failure = now.Failure.Error()
	}
	if connected.Address.IsValid() {
		out.TrAddr = connected.Address.Addr().String()
	}
	out.CNTLID, out.Version = connected.CNTLID, connected.Version.String()
	out.Model, out.Serial, out.Firmware = connected.Model, connected.Serial, connected.Firmware
	out.RDMADevice, out.Memory = connected.Device, "registered"
	out.InCapsule, out.SQFlow, out.QueueSize = connected.InCapsule, connected.SQFlow, connected.QueueSize
	out.Queues = describeQueues(connected.Plan)
	for _, l := range now.Lanes {
		out.Lanes = append(out.Lanes, control.Lane{
			Submitted: l.Submitted, Completed: l.Completed, HandedOver: l.HandedOver, Retried: l.Retried,
		})
	}
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
}

func describeDevice(v *serving) control.Device {
	g, q := v.device.Geometry(), v.dev.Queues()
	return control.Device{
		Device: v.dev.Record().Name(), NSID: v.nsid, UUID: v.uuid,
		Size: g.Sectors << block.SectorShift, BlockSize: g.LogicalBlock, ReadOnly: g.ReadOnly, WriteCache: g.VolatileCache,
		Queues: q.Queues, QueueDepth: q.Depth, MaxIO: q.MaxIO,
		BufferBytes: q.Queues * q.Depth * q.MaxIO,
		Counters:    v.dev.Counters(),
	}
}
