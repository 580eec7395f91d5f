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
func remoteDisk(b *testing.B, wire bool, loops []*poller.Loop) *initiator.Namespace {
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
	return s.Namespaces()[0]
}

// cpuTime returns the CPU time of this process.
func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkZeroCopy compares a guest's requests of 128 KiB at depth 8 with and without a copy, in
// rounds that take turns. Each operation is one request with and one without. It reports medians of
// the rounds, and the least and the largest ratio. The CPU time is that of guest, server and target.
func BenchmarkZeroCopy(b *testing.B) {
	for _, bb := range []struct {
		name string
		wire bool
		kind uint32
	}{{"fabric/read", false, vhosttest.In}, {"fabric/write", false, vhosttest.Out}, {"RoCE/read", true, vhosttest.In}, {"RoCE/write", true, vhosttest.Out}} {
		b.Run(bb.name, func(b *testing.B) {
			loops := newLoops(b, 1)
			disk := remoteDisk(b, bb.wire, loops)
			var rings [2]*vhosttest.Ring
			var heads [2][]uint16
			for i := range rings {
				s := newServer(b, Config{Device: disk, Loops: loops, ZeroCopy: i == 1})
				rings[i] = connect(b, s, vhosttest.Config{Data: 128 << 10, Sealed: true}).Rings[0]
				for slot := range uint16(8) {
					heads[i] = append(heads[i], rings[i].Prepare(slot+1, bb.kind, 256*uint64(slot), 128<<10))
				}
			}
			const rounds = 11
			times, cpus, took := []float64{}, []float64{}, [2][]float64{}
			for b.Loop() {
				for range rounds {
					var took1, cpu1 [2]time.Duration
					for i := range rings {
						began, cpu := time.Now(), cpuTime()
						for range 40 {
							round(rings[i], heads[i])
						}
						took1[i], cpu1[i] = time.Since(began), cpuTime()-cpu
						took[i] = append(took[i], float64(took1[i].Nanoseconds())/(40*8))
					}
					times = append(times, float64(took1[0])/float64(took1[1]))
					cpus = append(cpus, float64(cpu1[0])/float64(cpu1[1]))
				}
			}
			b.ReportMetric(median(took[0]), "ns-copy/req")
			b.ReportMetric(median(took[1]), "ns-zero/req")
			b.ReportMetric(median(times), "x-median")
			b.ReportMetric(slices.Min(times), "x-min")
			b.ReportMetric(slices.Max(times), "x-max")
			b.ReportMetric(median(cpus), "x-cpu")
		})
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
