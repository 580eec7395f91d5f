package state

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"ublk-nvmeof/internal/rundir"
)

// DuplicateError is the error for a subsystem to which another server is connected or
// connecting.
type DuplicateError struct{ Record Record }

func (e *DuplicateError) Error() string {
	return fmt.Sprintf("%s serves %s at %s already (%s, process %d)",
		e.Record.Name, e.Record.Target.NQN, e.Record.Target.Address, e.Record.Phase, e.Record.Process.PID)
}

// Entry is the record of the calling process.
type Entry struct {
	Record
	// Inherited says that the record belonged to another server. Args, Devices and
	// Listen are still those of that server.
	Inherited bool
	// Unreadable holds the errors of the records that cannot be read and may be of
	// the same subsystem.
	Unreadable []error

	root Dir
	// home is the directory of the record. If somebody removes the directory, another
	// server may get its name, and this one must not write there.
	home *os.Root
}

// Reserve takes a name for the calling process, which is about to connect to target.
// Unless duplicate is set, the error is a *DuplicateError if a live server serves the
// subsystem, at whatever address, and the record of a dead server of the subsystem becomes
// the record of the caller: that of a server with the same target, if there is one, and
// otherwise the first. Controllers of the Entry are those of all dead servers of the
// subsystem. The caller must wait for their end.
func (d Dir) Reserve(ctx context.Context, target Target, args []string, duplicate bool) (*Entry, error) {
	self, err := Of(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := rundir.Make(string(d), 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	unlock, err := d.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	records, err := d.List()
	if err != nil {
		return nil, err
	}
	var heirless *Record
	var unreadable []error
	for _, r := range records {
		switch {
		case r.Err != nil && r.Target.NQN == target.NQN:
			return nil, fmt.Errorf("%s is a record of the same subsystem: %w", r.Name, r.Err)
		case r.Err != nil:
			unreadable = append(unreadable, r.Err)
		case !r.Target.sameSubsystem(target) || duplicate:
		case r.Alive:
			return nil, &DuplicateError{r}
		case heirless == nil || heirless.Target != target && r.Target == target:
			heirless = &r
		}
	}
	e := &Entry{root: d, Unreadable: unreadable}
	if heirless != nil {
		e.Record = *heirless
		return e, e.adopt(self, records)
	}
	e.State = State{SchemaVersion: SchemaVersion, Process: self, Phase: Connecting, Target: target, Args: args}
	return e, e.take(records)
}

// Adopt makes the record of a server that has ended the record of the calling process.
// Controllers of the Entry are as for Reserve.
func (d Dir) Adopt(ctx context.Context, name string) (*Entry, error) {
	return d.inherit(ctx, name, func(r Record, _ Process) bool { return !r.Alive })
}

// AdoptAgain does the same with a record that the calling process has adopted or inherited
// before, and whose devices it has not taken over.
func (d Dir) AdoptAgain(ctx context.Context, name string) (*Entry, error) {
	return d.inherit(ctx, name, func(r Record, self Process) bool { return r.Process == self && r.Phase == Connecting })
}

// inherit makes a record the caller's if that is allowed.
func (d Dir) inherit(ctx context.Context, name string, allowed func(r Record, self Process) bool) (*Entry, error) {
	self, err := Of(os.Getpid())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := d.Find(name)
	switch {
	case err != nil:
		return nil, err
	case !allowed(r, self):
		return nil, fmt.Errorf("%s is served by process %d", name, r.Process.PID)
	}
	records, err := d.List()
	if err != nil {
		return nil, err
	}
	e := &Entry{Record: r, root: d}
	return e, e.adopt(self, records)
}

// adopt makes the record of a dead server that of another process. The rest of the
// record stays as it is until that process has taken over everything. The caller holds
// the lock.
func (e *Entry) adopt(by Process, records []Record) error {
	if err := os.Remove(e.Socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a dead server's socket: %w", err)
	}
	if _, err := e.open(); err != nil {
		return err
	}
	e.Inherited, e.Alive = true, true
	e.Process, e.Phase = by, Connecting
	return e.inheritControllers(records)
}

// take makes the directory with the first free name. The caller holds the lock.
func (e *Entry) take(records []Record) error {
	e.Alive = true
	for n := 0; ; n++ {
		e.Name = namePrefix + strconv.Itoa(n)
		e.dir = filepath.Join(string(e.root), e.Name)
		err := os.Mkdir(e.dir, 0o755)
		if errors.Is(err, fs.ErrExist) {
			// A directory without a state belongs to nobody. The process
			// that made it held the lock and died before it wrote a state.
			if _, err := os.Lstat(filepath.Join(e.dir, stateFile)); !errors.Is(err, fs.ErrNotExist) {
				continue
			}
		} else if err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		if err := e.inheritControllers(records); err != nil {
			return errors.Join(err, os.RemoveAll(e.dir))
		}
		if err := os.Remove(e.Socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a dead server's socket: %w", err)
		}
		return nil
	}
}

// inheritControllers adds to the entry the controllers of all dead servers of the
// subsystem, and those that live servers inherited and may still wait for, and saves it.
// Those without another record are on this one only from now on. The caller has the lock.
func (e *Entry) inheritControllers(records []Record) error {
	left, err := e.root.leftControllers()
	if err != nil {
		return err
	}
	gone := left.of(e.Target)
	var sources []Record
	for _, r := range records {
		if r.Err != nil || !r.Target.sameSubsystem(e.Target) {
			continue
		}
		if r.Alive {
			r.Controllers = r.Earlier
		}
		if len(r.Controllers) > 0 {
			sources = append(sources, r)
		}
	}
	sources = append(sources, Record{State: State{Controllers: gone.Controllers, KeepAlive: gone.KeepAlive}})
	var all []Controller
	for _, r := range sources {
		all = append(all, r.Controllers...)
		e.KeepAlive = max(e.KeepAlive, r.KeepAlive)
	}
	e.Controllers = Distinct(append(all, e.Controllers...))
	e.Earlier = e.Controllers
	e.Made = lastMade(sources)
	if err := e.Save(); err != nil {
		return err
	}
	return e.root.saveLeft(left.without(e.Target))
}

// Forget removes controllers that the target has ended from the records of all dead servers
// of the same connection, because the target may now give their ids to other controllers.
// A target at another address may be another one of the same subsystem, which does not know
// these controllers, so its answer does not count.
func (e *Entry) Forget(ctx context.Context, ended []Controller) error {
	unlock, err := e.root.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	records, err := e.root.List()
	if err != nil {
		return err
	}
	for _, r := range records {
		if r.Err != nil || r.Alive || r.Target != e.Target {
			continue
		}
		kept := slices.DeleteFunc(slices.Clone(r.Controllers), func(c Controller) bool { return slices.Contains(ended, c) })
		if len(kept) == len(r.Controllers) {
			continue
		}
		r.Controllers = kept
		if err := writeFile(filepath.Join(r.dir, stateFile), r.State, public); err != nil {
			return err
		}
	}
	return nil
}

// Save replaces the saved state atomically.
func (e *Entry) Save() error {
	home, err := e.open()
	if err != nil {
		return err
	}
	return writeIn(home, stateFile, e.State, public)
}

// open opens the directory of the record, once.
func (e *Entry) open() (*os.Root, error) {
	if e.home != nil {
		return e.home, nil
	}
	home, err := os.OpenRoot(e.dir)
	if err != nil {
		return nil, fmt.Errorf("open the record of %s: %w", e.Name, err)
	}
	e.home = home
	return home, nil
}

// there reports whether the name still leads to the directory of the record.
func (e *Entry) there() bool {
	home, err := e.open()
	if err != nil {
		return false
	}
	own, err := home.Stat(".")
	if err != nil {
		return false
	}
	now, err := os.Lstat(e.dir)
	return err == nil && os.SameFile(own, now)
}

// Retire removes the record of the calling process, which is about to end. unfinished
// are the controllers that the target may still have. The next server of the subsystem
// waits for their end. After an error the record remains.
func (e *Entry) Retire(ctx context.Context, unfinished []Controller) error {
	unlock, err := e.root.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := e.root.keep(e.Record, unfinished); err != nil || !e.there() {
		return err
	}
	return e.root.remove(e.Record)
}

// Clear removes the record of a dead server if ended reports that none of its devices is
// left, and returns that result. It also returns true if there is no such record. The
// controllers of the server stay recorded.
func (d Dir) Clear(ctx context.Context, name string, ended func(context.Context, Record) (bool, error)) (bool, error) {
	unlock, err := d.lock(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unlock()
	r, err := d.Find(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, err
	case r.Alive:
		return false, fmt.Errorf("%s is served by process %d", name, r.Process.PID)
	}
	if done, err := ended(ctx, r); !done {
		return false, err
	}
	if err := d.keep(r, r.Controllers); err != nil {
		return true, err
	}
	return true, d.remove(r)
}

// keep keeps the controllers of a record that is about to be removed. The caller holds the
// lock.
func (d Dir) keep(r Record, unfinished []Controller) error {
	if len(unfinished) == 0 {
		return nil
	}
	left, err := d.leftControllers()
	if err != nil {
		return err
	}
	return d.saveLeft(left.with(r.Target, unfinished, r.KeepAlive))
}

// remove removes a record. The caller holds the lock, so that no server that looks for
// a free name takes the directory meanwhile.
func (d Dir) remove(r Record) error {
	if err := os.RemoveAll(r.dir); err != nil {
		return fmt.Errorf("remove the record of %s: %w", r.Name, err)
	}
	return nil
}
