package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/ublk"
)

// secondLook is the time after which a device without a server is checked again. By
// then a server that was just adding it has recorded it or serves it.
const secondLook = time.Second

// Finding is a device or a record that a server left.
type Finding struct {
	What   string // path of the device, or name of the server
	Why    string
	Remove bool // nobody can use it any more
	Err    error

	info ublk.Info
}

// Collect finds the records of dead servers and the ublk devices that this program
// added. If remove is set, it removes those that nobody can use any more. It keeps what
// another server can take over, devices that are open, and records that it cannot read.
// Devices come first, then records.
func Collect(ctx context.Context, dir state.Dir, remove bool) ([]Finding, error) {
	found, err := actual.collect(ctx, dir)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(found, func(f Finding) bool { return f.Remove }) {
		select {
		case <-time.After(secondLook):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		again, err := actual.collect(ctx, dir)
		if err != nil {
			return nil, err
		}
		found = both(found, again)
	}
	if !remove {
		return found, nil
	}
	for i := range found {
		if f := &found[i]; f.Remove {
			f.Err = actual.discard(ctx, dir, f)
		}
	}
	return found, nil
}

// both returns the findings of the second check. It marks a finding for removal only
// if both checks do.
func both(first, second []Finding) []Finding {
	for i := range second {
		f := &second[i]
		f.Remove = f.Remove && slices.ContainsFunc(first, func(g Finding) bool {
			return g.Remove && g.What == f.What && g.info.Cookie == f.info.Cookie
		})
	}
	return second
}

func (b *backend) collect(ctx context.Context, dir state.Dir) ([]Finding, error) {
	records, err := dir.List()
	if err != nil {
		return nil, err
	}
	devices, err := b.list(ctx)
	if err != nil && !errors.Is(err, ublk.ErrNoDriver) && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var found []Finding
	for _, i := range devices {
		if !i.Ours() {
			continue
		}
		if f, ok := finding(i, records); ok {
			found = append(found, f)
		}
	}
	for _, r := range records {
		if f, ok := b.findingOf(r, devices); ok {
			found = append(found, f)
		}
	}
	return found, nil
}

// finding returns the finding about a device of this program. It returns false if there
// is none.
func finding(i ublk.Info, records []state.Record) (Finding, bool) {
	f := Finding{What: i.Path(), info: i}
	k := slices.IndexFunc(records, func(r state.Record) bool {
		return slices.ContainsFunc(r.Devices, func(d state.Device) bool { return d.Kind == state.Ublk && d.ID == i.ID && d.Cookie == i.Cookie })
	})
	unread := slices.IndexFunc(records, func(r state.Record) bool { return r.Err != nil })
	switch {
	case i.State == ublk.Live, k >= 0 && records[k].Alive:
		return f, false // a server serves it
	case k < 0 && unread >= 0:
		f.Why = fmt.Sprintf("no readable record names it; the record of %s cannot be read and may name it", records[unread].Name)
	case i.State == ublk.Dead:
		f.Why, f.Remove = "its server died, and its block device is gone", true
	case k >= 0:
		f.Why = "waits for a server; recover takes it over, disconnect removes it"
	default:
		f.Why, f.Remove = "waits for a server, but no record names it", true
	}
	return f, true
}

// findingOf returns the finding about a record. It returns false if there is none, for
// instance because one of its ublk devices waits and has a finding.
func (b *backend) findingOf(r state.Record, devices []ublk.Info) (Finding, bool) {
	f := Finding{What: r.Name}
	if r.Err != nil {
		f.Why = r.Err.Error()
		return f, true
	}
	if r.Alive {
		return f, false
	}
	for _, d := range r.Devices {
		switch d.Kind {
		case state.NBDSocket, state.VhostUserBlk:
			f.Why = fmt.Sprintf("clients may wait for %s; recover takes it over, disconnect gives it up", d.Path())
			return f, true
		case state.NBD:
			if there, err := b.nbdConnected(d.ID, d.Cookie); there || err != nil {
				f.Why = d.Path() + " is connected; disconnect removes it"
				return f, true
			}
		case state.Ublk:
			if slices.ContainsFunc(devices, func(i ublk.Info) bool {
				return i.ID == d.ID && i.Cookie == d.Cookie && i.State != ublk.Dead
			}) {
				return f, false
			}
		}
	}
	f.Remove = true
	f.Why = "its server died, and its devices are gone"
	if len(r.Devices) == 0 {
		f.Why = "its server died, and had no device"
	}
	return f, true
}

// discard removes the device or the record of a finding.
func (b *backend) discard(ctx context.Context, dir state.Dir, f *Finding) error {
	switch {
	case f.info.Cookie == 0:
		_, err := dir.Clear(ctx, f.What, b.reap(slog.New(slog.DiscardHandler), Keep))
		return err
	case f.info.State == ublk.Dead:
		return b.remove(ctx, f.info)
	}
	return b.abandon(ctx, f.info, false)
}
