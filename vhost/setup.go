package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// The messages about memory and rings.

// setMemTable replaces all memory regions.
func (n *session) setMemTable(m *message) error {
	if len(m.payload) < 8 {
		return fmt.Errorf("payload of %d bytes", len(m.payload))
	}
	count := binary.LittleEndian.Uint32(m.payload)
	if count > maxFDs || int(count) != len(m.fds) || len(m.payload) < 8+int(count)*areaSize {
		return fmt.Errorf("%d regions, %d file descriptors and %d bytes do not fit together", count, len(m.fds), len(m.payload))
	}
	var regions []*region
	for i := range int(count) {
		r, err := n.mapRegion(decodeArea(m.payload[8+i*areaSize:]), m.fds[i])
		if err != nil {
			return errors.Join(fmt.Errorf("region %d: %w", i, err), n.unmapAll(regions))
		}
		regions = append(regions, r)
	}
	old := n.regions
	n.regions = regions
	if err := n.pushMemory(); err != nil {
		n.regions = append(regions, old...) // release unmaps them
		return err
	}
	return n.unmapAll(old)
}

// mapRegion maps a region. With zero copy, the back end gets it; if it cannot, its data is
// copied.
func (n *session) mapRegion(a area, fd int) (*region, error) {
	r, err := mapRegion(a, fd)
	if err != nil {
		return nil, err
	}
	n.addMapping(r.raw)
	if n.server.cfg.ZeroCopy {
		if err := r.lend(n.server.cfg.Device.(block.Registrar), fd); err != nil {
			n.warnCopied(r, err)
		}
	}
	return r, nil
}

func (n *session) warnCopied(r *region, err error) {
	n.server.events.Warn("data of guest memory is copied", "front_end", n.peer, "guest_address", r.guest, "bytes", r.size, "reason", err)
}

// unmapAll unmaps regions that the loops do not use any more. One that the back end does not give
// back stays mapped.
func (n *session) unmapAll(regions []*region) error {
	var errs []error
	for _, r := range regions {
		if err := r.takeBack(); err != nil {
			errs = append(errs, err)
			continue
		}
		n.removeMapping(r.raw)
		errs = append(errs, r.unmap())
	}
	return errors.Join(errs...)
}

// renewMemory has the back end access the guest's memory no more on behalf of earlier requests.
func (n *session) renewMemory() error {
	if !n.server.cfg.ZeroCopy || n.memory == nil {
		return nil
	}
	old := n.regions
	n.regions = nil
	for _, r := range old {
		again := *r
		if r.lent != nil {
			var err error
			if again.lent, err = n.server.cfg.Device.(block.Registrar).Register(r.mem); err != nil {
				again.lent = nil
				n.warnCopied(r, err)
			}
		}
		n.regions = append(n.regions, &again)
	}
	errs := []error{n.pushMemory()}
	for _, r := range old {
		errs = append(errs, r.takeBack())
	}
	return errors.Join(errs...)
}

// decodeSingle decodes the payload of ADD_MEM_REG and REM_MEM_REG.
func decodeSingle(p []byte) (area, error) {
	if len(p) != 8+areaSize {
		return area{}, fmt.Errorf("payload of %d bytes, want %d", len(p), 8+areaSize)
	}
	return decodeArea(p[8:]), nil
}

func (n *session) addRegion(m *message) error {
	a, err := decodeSingle(m.payload)
	if err != nil {
		return err
	}
	if len(m.fds) != 1 {
		return fmt.Errorf("%d file descriptors, want 1", len(m.fds))
	}
	r, err := n.mapRegion(a, m.fds[0])
	if err != nil {
		return err
	}
	n.regions = append(slices.Clone(n.regions), r)
	return n.pushMemory()
}

// removeRegion removes a memory region. Requests in flight that use it end the session,
// when they touch it.
func (n *session) removeRegion(m *message) error {
	a, err := decodeSingle(m.payload)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(n.regions, func(r *region) bool { return r.guest == a.guest && r.user == a.user && r.size == a.size })
	if i < 0 {
		return fmt.Errorf("there is no region with guest address %#x, user address %#x and size %#x", a.guest, a.user, a.size)
	}
	old := n.regions
	n.regions = slices.Delete(slices.Clone(old), i, i+1)
	if err := n.pushMemory(); err != nil {
		n.regions = old // release unmaps them
		return err
	}
	return n.unmapAll(old[i : i+1])
}

// pushMemory makes all loops use the present regions and the present log. When it returns,
// no loop uses others.
func (n *session) pushMemory() error {
	log := n.log
	if n.features&featLogAll == 0 {
		log = nil
	}
	mem, err := newMemory(n.regions, log)
	if err != nil {
		return err
	}
	n.memory = mem
	return n.onAll(func(w *worker) error { return w.setMemory(mem) })
}

// setLogBase takes the log for a migration.
func (n *session) setLogBase(m *message) (answered bool, err error) {
	if n.protocol&protoLogShmFD == 0 {
		return false, errors.New("the protocol feature LOG_SHMFD was not negotiated")
	}
	if len(m.payload) != 16 || len(m.fds) != 1 {
		return false, fmt.Errorf("payload of %d bytes and %d file descriptors, want 16 and 1", len(m.payload), len(m.fds))
	}
	le := binary.LittleEndian
	l, err := mapLog(m.fds[0], le.Uint64(m.payload), le.Uint64(m.payload[8:]))
	if err != nil {
		return false, err
	}
	n.addMapping(l.raw)
	old := n.log
	n.log = l
	if err := n.pushMemory(); err != nil {
		return false, err
	}
	if old != nil {
		n.removeMapping(old.raw)
		if err := old.unmap(); err != nil {
			return false, err
		}
	}
	return true, n.replyU64(m, 0)
}

// frontRing returns the ring with a number that a message names.
func (n *session) frontRing(index uint32) (*frontRing, error) {
	if index >= maxRings {
		return nil, fmt.Errorf("ring %d, want one below %d", index, maxRings)
	}
	return &n.rings[index], nil
}

// stoppedRing is frontRing for messages that a ring must not get while it is served.
func (n *session) stoppedRing(m *message) (f *frontRing, num uint32, err error) {
	index, num, err := m.vringState()
	if err != nil {
		return nil, 0, err
	}
	if f, err = n.frontRing(index); err != nil {
		return nil, 0, err
	}
	if f.served != nil {
		return nil, 0, fmt.Errorf("ring %d is being served", index)
	}
	return f, num, nil
}

func (n *session) setNum(m *message) error {
	f, num, err := n.stoppedRing(m)
	if err != nil {
		return err
	}
	if num == 0 || num > maxRingSize || num&(num-1) != 0 {
		return fmt.Errorf("%d entries, want a power of two up to %d", num, maxRingSize)
	}
	f.num = uint16(num)
	return nil
}

func (n *session) setBase(m *message) error {
	f, num, err := n.stoppedRing(m)
	if err != nil {
		return err
	}
	if num > 1<<16-1 {
		return fmt.Errorf("base %d, want up to %d", num, 1<<16-1)
	}
	f.base = uint16(num)
	return nil
}

// setAddr tells where a ring is. QEMU also sends it for a ring that is served, to begin or
// end the logging of its writes.
func (n *session) setAddr(m *message) error {
	index, a, err := decodeVringAddr(m.payload)
	if err != nil {
		return err
	}
	f, err := n.frontRing(index)
	if err != nil {
		return err
	}
	f.addr, f.located = a, true
	if f.served == nil {
		return n.update(int(index))
	}
	return n.on(int(index), func(w *worker) error { return f.served.locate(w.mem, a) })
}

// setEnable enables or disables a ring. The rings of a guest without PROTOCOL_FEATURES are
// always enabled.
func (n *session) setEnable(m *message) error {
	index, on, err := m.vringState()
	if err != nil {
		return err
	}
	f, err := n.frontRing(index)
	if err != nil {
		return err
	}
	if on > 1 {
		return fmt.Errorf("state %d, want 0 or 1", on)
	}
	f.enabled = on == 1
	return n.update(int(index))
}

// noFD in the payload of SET_VRING_KICK and SET_VRING_CALL says that there is no eventfd.
const noFD = 1 << 8

// ringFD is the payload of SET_VRING_KICK and SET_VRING_CALL: the number of a ring, and
// an eventfd or -1.
func (n *session) ringFD(m *message) (index uint32, fd int, err error) {
	v, err := m.u64()
	if err != nil {
		return 0, -1, err
	}
	index = uint32(v & 0xFF)
	switch {
	case v&^(noFD|0xFF) != 0:
		return 0, -1, fmt.Errorf("unknown bits in %#x", v)
	case v&noFD != 0:
		if len(m.fds) != 0 {
			return 0, -1, errors.New("a file descriptor comes with the flag that there is none")
		}
		return index, -1, nil
	}
	if fd, err = m.takeFD(); err != nil {
		return 0, -1, err
	}
	if !isEventfd(fd) {
		return 0, -1, errors.Join(errors.New("the file is not an eventfd"), unix.Close(fd))
	}
	return index, fd, nil
}

func (n *session) setKick(m *message) error {
	index, fd, err := n.ringFD(m)
	if err != nil {
		return err
	}
	f := &n.rings[index]
	old := f.kick
	f.kick, f.kicked = fd, true
	if f.served == nil {
		closeFD(old)
		return n.update(int(index))
	}
	err = n.on(int(index), func(w *worker) error { return w.setPolled(f.served, fd < 0) })
	if err == nil {
		err = n.watch(int(index), fd)
	}
	n.unwatch(int(index), old)
	closeFD(old)
	return err
}

func (n *session) setCall(m *message) error {
	index, fd, err := n.ringFD(m)
	if err != nil {
		return err
	}
	f := &n.rings[index]
	old := f.call
	f.call = fd
	if f.served != nil {
		// A write to the old one may not have been submitted yet, so it stays open until
		// the new one is in use and the old one is not.
		if err := n.replaceCall(f, int(index), fd); err != nil {
			closeFD(old)
			return err
		}
	}
	closeFD(old)
	return nil
}

// replaceCall changes the eventfd of a ring that is served, and notifies the guest once,
// because a notification may have been lost.
func (n *session) replaceCall(f *frontRing, index, fd int) error {
	var quiet chan struct{}
	err := n.on(index, func(w *worker) error {
		r := f.served
		r.call = -1
		quiet = make(chan struct{})
		r.quiet = quiet
		w.cancelCall(r)
		w.hush(r)
		return nil
	})
	if err != nil {
		return err
	}
	select {
	case <-quiet:
	case <-n.loopDone(index):
		return ErrStopped
	}
	return n.on(index, func(w *worker) error {
		f.served.call = fd
		w.callRing(f.served)
		return nil
	})
}

func (n *session) loopDone(ring int) <-chan struct{} {
	return n.server.cfg.Loops[ring%len(n.server.cfg.Loops)].Done()
}

// getBase stops a ring after its requests, and answers with the next entry of the available
// ring.
func (n *session) getBase(m *message) error {
	index, _, err := m.vringState()
	if err != nil {
		return err
	}
	f, err := n.frontRing(index)
	if err != nil {
		return err
	}
	if f.served != nil {
		if err := n.stopRing(f, int(index)); err != nil {
			return err
		}
	}
	le := binary.LittleEndian
	return n.reply(m, le.AppendUint32(le.AppendUint32(nil, index), uint32(f.base)))
}

// stopRing stops a ring after its requests.
func (n *session) stopRing(f *frontRing, index int) error {
	r := f.served
	err := n.on(index, func(w *worker) error {
		w.stop(r)
		return nil
	})
	if err != nil {
		return err
	}
	select {
	case <-r.done:
	case <-n.failed:
		return n.err
	case <-n.hungUp:
		return errHungUp
	case <-n.loopDone(index):
		return ErrStopped
	}
	f.base = r.lastAvail
	n.endRing(f, index)
	return nil
}

// endRing closes what belongs to a ring that is not served any more.
func (n *session) endRing(f *frontRing, index int) {
	if f.served == nil {
		return
	}
	select {
	case <-f.served.done:
	case <-n.loopDone(index):
	}
	f.served = nil
	n.unwatch(index, f.kick)
	closeFD(f.kick)
	closeFD(f.call)
	f.kick, f.call, f.kicked = -1, -1, false
}

// resetDevice stops and disables all rings. Their requests are given up.
func (n *session) resetDevice() error {
	for i := range n.rings {
		f := &n.rings[i]
		f.enabled = false
		if f.served == nil {
			continue
		}
		err := n.on(i, func(w *worker) error {
			w.reset(f.served)
			return nil
		})
		if err != nil {
			return err
		}
		n.endRing(f, i)
	}
	return n.renewMemory() // the guest may use its buffers for something else now
}

func (n *session) updateAll() error {
	for i := range n.rings {
		if err := n.update(i); err != nil {
			return err
		}
	}
	return nil
}

// update begins to serve a ring that is ready, or tells its loop whether it is enabled.
func (n *session) update(i int) error {
	f := &n.rings[i]
	enabled := f.enabled || n.features&featProtocolFeatures == 0
	if f.served != nil {
		return n.on(i, func(*worker) error {
			f.served.enabled = enabled
			return nil
		})
	}
	if !enabled || !f.kicked || !f.located || f.num == 0 {
		return nil
	}
	if n.memory == nil {
		return errors.New("there is no guest memory yet")
	}
	r := &vring{
		index: i, num: f.num, addr: f.addr, call: f.call, enabled: true,
		eventIdx: n.features&featEventIdx != 0, indirect: n.features&featIndirect != 0,
		batch: make([]uint16, 0, maxBatch), done: make(chan struct{}),
	}
	var err error
	if r.track, err = n.inflight.track(i, int(r.num)); err != nil {
		return err
	}
	if err := n.on(i, func(w *worker) error { return w.serve(r, f.base) }); err != nil {
		return err
	}
	f.served = r
	if err := n.on(i, func(w *worker) error { return w.setPolled(r, f.kick < 0) }); err != nil {
		return err
	}
	return n.watch(i, f.kick)
}

// kicked is the Watcher of the eventfd of a ring. The wake-up is enough, because the worker
// then looks at all rings.
type kicked struct{ session *session }

func (kicked) Event(int) {}

func (k kicked) Failed(err error) { k.session.fail(fmt.Errorf("wait for kicks: %w", err)) }

func (n *session) watch(ring, fd int) error {
	if fd < 0 {
		return nil
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	l := n.server.cfg.Loops[ring%len(n.server.cfg.Loops)]
	var err error
	lost := l.Call(func() { err = l.Watch(fd, kicked{n}) })
	return errors.Join(err, lost)
}

// unwatch ends a watch. Kicks that come later are not needed.
func (n *session) unwatch(ring, fd int) {
	if fd >= 0 {
		_ = n.server.cfg.Loops[ring%len(n.server.cfg.Loops)].Unwatch(fd) // it may not have been watched
	}
}
