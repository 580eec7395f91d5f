package target

import (
	"fmt"
	"sync"
	"testing"

	"ublk-nvmeof/nvme"
)

// TestChurn lets hosts connect, do I/O and disappear, while everything that can change
// in a subsystem changes.
func TestChurn(t *testing.T) {
	const hosts, rounds = 3, 5
	r, ram, ns := newDisk(t, Config{MaxTransfer: 64 << 10, QueueSize: 32}, 1<<20, NamespaceConfig{})
	steps := make(chan struct{}, 1) // something changes after each command
	var changes sync.WaitGroup
	changes.Go(func() {
		i := 0
		for range steps {
			i++
			if err := ram.Resize(1<<20 - int64(i%2)<<18); err != nil {
				t.Error(err)
			}
			ns.Revalidate()
			ns.SetReadOnly(i%3 == 0)
			if err := r.subsys.SetANAState(1, []nvme.ANAState{nvme.ANAOptimized, nvme.ANANonOptimized, nvme.ANAChange}[i%3]); err != nil {
				t.Error(err)
			}
			if err := r.subsys.SetMaxQueues(2 + i%5); err != nil {
				t.Error(err)
			}
			if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 2, Store: ram}); err != nil {
				t.Error(err)
			}
			added := r.target.Faults().Add(Fault{Match: Match{QID: 2}, Skip: 1, Count: 1, Status: nvme.StatusInternal})
			r.target.Snapshot()
			if err := r.subsys.RemoveNamespace(2); err != nil {
				t.Error(err)
			}
			added.Remove()
		}
	})
	t.Run("hosts", func(t *testing.T) {
		for n := range hosts {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				for range rounds {
					r.visit(t, n, steps)
				}
			})
		}
	})
	close(steps)
	changes.Wait()
}

// visit connects a host with two I/O queues, uses them and disconnects. Each host has
// its own blocks.
func (r *rig) visit(t *testing.T, n int, steps chan<- struct{}) {
	own := *r
	own.t = t
	a := own.admin(testNQN)
	queues := []*hostQueue{own.io(a, 1, 16), own.io(a, 2, 32)}
	a.arm(1)
	for i := range 20 {
		select {
		case steps <- struct{}{}:
		default:
		}
		h := queues[i%2]
		var cmd nvme.Command
		slba := uint64(n*512 + 8*i)
		if i%3 == 0 {
			cmd.SetWrite(uint32(1+i%2), slba, 64, false)
		} else {
			cmd.SetRead(uint32(1+i%2), slba, 64, false)
		}
		h.keyed(&cmd, 32<<10)
		cmd.SetCID(uint16(i))
		h.send(&cmd, nil)
		if !h.await() || h.response.CID() != uint16(i) {
			t.Fatalf("response %v", &h.response)
		}
		switch s := h.response.Status(); s.Code() {
		case nvme.StatusSuccess, nvme.StatusInvalidNamespace, nvme.StatusLBAOutOfRange, nvme.StatusNamespaceWriteProtected,
			nvme.StatusANATransition, nvme.StatusInternal:
		default:
			t.Fatalf("status %v", s)
		}
	}
	for _, h := range append(queues, a) {
		if err := h.id.Close(); err != nil { // the end of the test frees its memory
			t.Error(err)
		}
	}
}
