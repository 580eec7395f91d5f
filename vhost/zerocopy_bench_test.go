package vhost

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
	"ublk-nvmeof/vhost/vhosttest"
)

// remoteDisk returns a namespace of a target in this process. The fabric is in process, where a
// transfer costs one copy as with an adapter, or RoCEv2 over UDP, where it costs three and system
// calls.
func remoteDisk(b testing.TB, wire bool, loops []*poller.Loop) (*initiator.Namespace, *target.Target) {
	b.Helper()
	const nqn = "nqn.2026-01.org.example:bench"
	at := netip.AddrPortFrom(netip.MustParseAddr("127.0.24.1"), 4420)
	var ours, theirs rdma.Provider
	if wire {
		open := func(addr string) rdma.Provider {
			p, err := roce.New(roce.Config{Addrs: []netip.Addr{netip.MustParseAddr(addr)}})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { p.Close() })
			return p
		}
		theirs, ours = open("127.0.24.1"), open("127.0.24.2")
	} else {
		fabric := rdmatest.NewFabric()
		theirs, ours = fabric.Provider(at.Addr()), fabric.Provider(at.Addr().Next())
	}
	far, err := target.New(target.Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { far.Close() })
	if _, err := far.AddPorts(target.PortConfig{Provider: theirs, Addr: at}); err != nil {
		b.Fatal(err)
	}
	sub, err := far.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := sub.AddNamespace(target.NamespaceConfig{NSID: 1, Store: target.NewRAM(64 << 20)}); err != nil {
		b.Fatal(err)
	}
	s, err := initiator.Connect(context.Background(), initiator.Config{
		Path: initiator.Path{Provider: ours, Address: at}, SubNQN: nqn, HostNQN: "nqn.2026-01.org.example:host", HostID: nvme.NewUUID(),
		Queues: poller.Request{IO: len(loops)}, Loops: loops,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close(context.Background()) })
	return s.Namespaces()[0], far
}

// cpuTime returns the CPU time of this process, and that of the thread of a loop.
func cpuTime(b *testing.B, l *poller.Loop) (process, loop time.Duration) {
	of := func(who int) time.Duration {
		var u unix.Rusage
		_ = unix.Getrusage(who, &u) // cannot fail
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	if err := l.Call(func() { loop = of(unix.RUSAGE_THREAD) }); err != nil {
		b.Fatal(err)
	}
	return of(unix.RUSAGE_SELF), loop
}

// BenchmarkZeroCopy compares a guest's requests at depth 8 with and without a copy, in
// rounds that take turns. Each operation is one request with and one without. It reports medians of
// the rounds, and the least and the largest ratio. The CPU time is that of guest, server and target, and
// that of the server alone, on whose thread an adapter does nothing. The
// data of a request is contiguous, or in pieces that do not touch each other.
func BenchmarkZeroCopy(b *testing.B) {
	const all = 128 << 10
	for _, bb := range []struct {
		name        string
		wire        bool
		kind        uint32
		size, piece uint32
	}{
		{"fabric/read", false, vhosttest.In, all, all}, {"fabric/write", false, vhosttest.Out, all, all},
		{"RoCE/read", true, vhosttest.In, all, all}, {"RoCE/write", true, vhosttest.Out, all, all},
		{"fabric/read-32x4KiB", false, vhosttest.In, all, 4096}, {"fabric/write-32x4KiB", false, vhosttest.Out, all, 4096},
		{"RoCE/read-32x4KiB", true, vhosttest.In, all, 4096}, {"RoCE/write-32x4KiB", true, vhosttest.Out, all, 4096},
		{"fabric/read-2x4KiB", false, vhosttest.In, 8192, 4096}, {"fabric/write-2x4KiB", false, vhosttest.Out, 8192, 4096},
		{"fabric/read-16x4KiB", false, vhosttest.In, 64 << 10, 4096}, {"fabric/read-16x8KiB", false, vhosttest.In, all, 8192},
	} {
		b.Run(bb.name, func(b *testing.B) {
			loops := newLoops(b, 1)
			disk, _ := remoteDisk(b, bb.wire, loops)
			var rings [2]*vhosttest.Ring
			var heads [2][]uint16
			for i := range rings {
				s := newServer(b, Config{Device: disk, Loops: loops, ZeroCopy: i == 1})
				rings[i] = connect(b, s, vhosttest.Config{Data: 2 * all, Sealed: true}).Rings[0]
				for slot := range uint16(8) {
					heads[i] = append(heads[i], rings[i].PrepareList(slot+1, bb.kind, 256*uint64(slot), pieces(rings[i], slot+1, bb.size, bb.piece)...))
				}
			}
			const rounds = 11
			times, cpus, servers, took := []float64{}, []float64{}, []float64{}, [2][]float64{}
			for b.Loop() {
				for range rounds {
					var took1, cpu1, server1 [2]time.Duration
					for i := range rings {
						cpu, server := cpuTime(b, loops[0])
						began := time.Now()
						for range 40 {
							round(rings[i], heads[i])
						}
						took1[i] = time.Since(began)
						cpu1[i], server1[i] = cpuTime(b, loops[0])
						cpu1[i], server1[i] = cpu1[i]-cpu, server1[i]-server
						took[i] = append(took[i], float64(took1[i].Nanoseconds())/(40*8))
					}
					times = append(times, float64(took1[0])/float64(took1[1]))
					cpus = append(cpus, float64(cpu1[0])/float64(cpu1[1]))
					servers = append(servers, float64(server1[0])/float64(server1[1]))
				}
			}
			b.ReportMetric(median(took[0]), "ns-copy/req")
			b.ReportMetric(median(took[1]), "ns-zero/req")
			b.ReportMetric(median(times), "x-median")
			b.ReportMetric(slices.Min(times), "x-min")
			b.ReportMetric(slices.Max(times), "x-max")
			b.ReportMetric(median(cpus), "x-cpu")
			b.ReportMetric(median(servers), "x-server")
		})
	}
}

// pieces returns buffers of so many bytes for a request: pages of a slot, with as much memory behind
// each.
func pieces(r *vhosttest.Ring, slot uint16, size, piece uint32) (all []vhosttest.Buffer) {
	_, at := r.Slot(slot)
	for n := uint32(0); n < size; n += piece {
		all = append(all, vhosttest.Buffer{Addr: vhosttest.GuestBase + at + 2*uint64(n), Length: piece})
	}
	return all
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
