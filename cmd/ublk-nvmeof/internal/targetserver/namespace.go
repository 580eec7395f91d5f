package targetserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/target"
)

type subsystem struct {
	*target.Subsystem
	cfg        options.Subsystem
	ana        map[string]string
	namespaces []*namespace
	removed    []*namespace // removed namespaces whose stores are still in use
}

// namespace is a namespace and its store. Exactly one of ram and file is set.
type namespace struct {
	*target.Namespace
	spec     options.Namespace
	ram      *target.RAM
	file     *target.File
	closer   io.Closer // closes the store, and a cache before it
	promised int64     // bytes of memory, see budget
}

// restTime is the longest time that a request waits until no command is inside a store.
// After that a removed store is closed in the background.
const restTime = 5 * time.Second

func (s *server) addSubsystem(c options.Subsystem) error {
	t, err := s.target.AddSubsystem(target.SubsystemConfig{
		NQN: c.NQN, MaxQueues: c.MaxQueues, AllowAny: len(c.AllowHosts) == 0, AllowHosts: c.AllowHosts,
	})
	if err != nil {
		return err
	}
	for _, a := range c.Auth {
		if err := t.SetHostAuth(a.Host, &a.HostAuth); err != nil {
			return err
		}
	}
	if c.MaxQueues == 0 {
		c.MaxQueues = target.DefaultMaxQueues
	}
	sub := &subsystem{Subsystem: t, cfg: c, ana: map[string]string{}}
	s.subsystems = append(s.subsystems, sub)
	for _, n := range c.Namespaces {
		if _, err := s.addNamespace(sub, n); err != nil {
			return err
		}
	}
	return nil
}

// addNamespace opens a store and adds a namespace for it. The caller holds the lock,
// unless the target has not started.
func (s *server) addNamespace(sub *subsystem, spec options.Namespace) (_ *namespace, err error) {
	n := &namespace{spec: spec}
	defer func() {
		if err != nil {
			err = fmt.Errorf("\"%s\": %w", spec, err)
		}
	}()
	store, err := s.openStore(n)
	if err != nil {
		return nil, err
	}
	n.Namespace, err = sub.AddNamespace(target.NamespaceConfig{
		NSID: spec.NSID, Store: store, BlockSize: spec.BlockSize, ReadOnly: spec.ReadOnly, ANAGroup: spec.ANAGroup,
		Identity: n.identity(), UUID: spec.UUID, NoUUID: spec.NoUUID, NGUID: spec.NGUID, EUI64: spec.EUI64,
	})
	if err != nil {
		return nil, errors.Join(err, s.closeStore(n))
	}
	if n.newAtStart() {
		s.log.Debug("namespace in memory gets a new identity at each start of the target; uuid=UUID gives it a permanent one",
			"subsystem", sub.cfg.NQN, "nsid", n.NSID(), "uuid", n.UUID().String())
	}
	sub.namespaces = append(sub.namespaces, n)
	return n, nil
}

// identity returns the text from which the UUID is derived, or "" for a random UUID. It
// is the path of the file without symbolic links, so that a file has the same UUID
// under all its paths.
func (n *namespace) identity() string {
	if n.file == nil {
		return ""
	}
	return n.file.Path()
}

// newAtStart reports whether the UUID is random.
func (n *namespace) newAtStart() bool {
	return n.ram != nil && n.spec.UUID.IsZero() && !n.spec.NoUUID
}

// openStore opens the store of a namespace. It fails if the store exceeds the memory
// limit.
func (s *server) openStore(n *namespace) (store target.Store, err error) {
	spec := n.spec
	if spec.File == "" {
		if err := s.promise(n, spec.RAM); err != nil {
			return nil, err
		}
		if n.ram, err = target.OpenRAM(spec.RAM); err != nil {
			return nil, errors.Join(err, s.promise(n, -n.promised))
		}
		store, n.closer = n.ram, n.ram
	} else {
		if n.file, err = openFile(spec); err != nil {
			return nil, err
		}
		store, n.closer = n.file, n.file
	}
	if spec.Cache > store.Size() {
		err := exit.Errorf(exit.Usage, "cache=%s: want at most the size of the namespace, %s", options.FormatSize(spec.Cache), options.FormatSize(store.Size()))
		return nil, errors.Join(err, s.closeStore(n))
	}
	if spec.Cache != 0 {
		if err := s.promise(n, spec.Cache); err != nil {
			return nil, errors.Join(err, s.closeStore(n))
		}
		c := target.NewCache(store, spec.Cache)
		store, n.closer = c, c // the cache closes the store under it
	}
	return store, nil
}

func openFile(spec options.Namespace) (*target.File, error) {
	f, err := target.OpenFile(spec.File, target.FileConfig{ReadOnly: spec.ReadOnly, Shared: spec.Shared})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, exit.Errorf(exit.NotFound, "%v", err)
	case errors.Is(err, target.ErrNotStorage):
		return nil, exit.Errorf(exit.Usage, "%v", err)
	case errors.Is(err, target.ErrInUse):
		return nil, exit.Errorf(exit.Busy, "%v; several namespaces may share it if each says \"shared\"", err)
	case err != nil:
		return nil, err
	}
	if f.Device() != spec.Device {
		kind, word := "a file", "file="
		if f.Device() {
			kind, word = "a block device", "device="
		}
		return nil, errors.Join(exit.Errorf(exit.Usage, "%s is %s; want %s", spec.File, kind, word), f.Close())
	}
	return f, nil
}

// promise takes size bytes of the memory limit for a namespace, or gives them back
// if size is negative.
func (s *server) promise(n *namespace, size int64) error {
	err := s.memory.take(size)
	if err == nil {
		n.promised += size
	}
	return err
}

// closeStore closes the store of a namespace. The namespace must not use it any more.
func (s *server) closeStore(n *namespace) error {
	return errors.Join(n.closer.Close(), s.promise(n, -n.promised))
}

// closeStores closes all stores after the target was closed.
func (s *server) closeStores() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ended)
	var errs []error
	for _, sub := range s.subsystems {
		for _, n := range slices.Concat(sub.namespaces, sub.removed) {
			errs = append(errs, s.closeStore(n))
		}
		sub.namespaces, sub.removed = nil, nil
	}
	return errors.Join(errs...)
}

func (s *server) add(r AddRequest) (Done, error) {
	spec, err := options.ParseNamespace(r.Namespace)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "namespace %q: %v; want %s", r.Namespace, err, options.NamespaceWords)
	}
	s.changes.Lock()
	defer s.changes.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	sub, err := s.one(r.NQN)
	if err != nil {
		return Done{}, err
	}
	n, err := s.addNamespace(sub, spec)
	if err != nil {
		return Done{}, err
	}
	return Done{NSID: n.NSID()}, nil
}

// remove removes a namespace, and closes its store when no command is inside it any
// more. It returns then, or after restTime.
func (s *server) remove(r RemoveRequest) (Done, error) {
	sub, n, err := s.take(r)
	if err != nil {
		return Done{}, err
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.retire(sub, n)
	}()
	select {
	case <-closed:
	case <-time.After(restTime):
		s.log.Warn("commands are still inside the store of a namespace that was removed", "subsystem", sub.cfg.NQN, "nsid", r.NSID)
	}
	return Done{}, nil
}

// take removes a namespace from its subsystem.
func (s *server) take(r RemoveRequest) (*subsystem, *namespace, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	sub, n, err := s.namespace(r.NQN, r.NSID)
	if err == nil {
		err = sub.RemoveNamespace(r.NSID)
	}
	if err != nil {
		return nil, nil, err
	}
	sub.namespaces = slices.DeleteFunc(sub.namespaces, func(have *namespace) bool { return have == n })
	sub.removed = append(sub.removed, n)
	return sub, n, nil
}

// retire waits until no command is inside the store of a removed namespace, and closes
// the store. If the target ends first, closeStores closes it.
func (s *server) retire(sub *subsystem, n *namespace) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-s.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	if n.Drained(ctx) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(sub.removed, n)
	if i < 0 {
		return // the target has ended
	}
	sub.removed = slices.Delete(sub.removed, i, i+1)
	if err := s.closeStore(n); err != nil {
		s.log.Error("cannot close the store of a removed namespace", "subsystem", sub.cfg.NQN, "nsid", n.NSID(), "error", err)
	}
}

func (s *server) resize(r ResizeRequest) (Done, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	n, more, err := s.mayResize(r)
	if err != nil {
		return Done{}, err
	}
	if r.Size == 0 {
		n.Revalidate()
		return Done{}, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), restTime)
	defer cancel()
	err = n.Resize(ctx, r.Size, func() error {
		if n.ram != nil {
			return n.ram.Resize(r.Size)
		}
		return n.file.Resize(r.Size)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		more = -more // the size is unchanged
	}
	return Done{}, errors.Join(err, s.promise(n, min(0, more)))
}

// mayResize checks a request. It returns the namespace and the number of bytes of
// additional memory, which may be negative. If it is positive, it has been promised.
func (s *server) mayResize(r ResizeRequest) (n *namespace, more int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, n, err = s.namespace(r.NQN, r.NSID)
	switch {
	case err != nil:
		return nil, 0, err
	case r.Size < 0 || r.Size == 0 && n.ram != nil:
		return nil, 0, exit.Errorf(exit.Usage, "a size is needed")
	case r.Size > 0 && n.spec.Device:
		return nil, 0, exit.Errorf(exit.Usage, "%s is a device, whose size cannot be changed", n.spec.File)
	case r.Size > target.MaxRAM:
		return nil, 0, exit.Errorf(exit.Usage, "%d bytes; want at most %d", r.Size, int64(target.MaxRAM))
	}
	if n.ram != nil {
		more = r.Size - n.ram.Size()
	}
	return n, more, s.promise(n, max(0, more))
}

func (s *server) readOnly(r ReadOnlyRequest) (Done, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, n, err := s.namespace(r.NQN, r.NSID)
	if err != nil {
		return Done{}, err
	}
	if !r.On && n.spec.ReadOnly && n.file != nil {
		return Done{}, exit.Errorf(exit.Usage, "%s is open for reading only", n.spec.File)
	}
	n.SetReadOnly(r.On)
	return Done{}, nil
}
