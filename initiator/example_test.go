package initiator_test

import (
	"context"
	"fmt"
	"net/netip"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// A host connects to a target in the same process. With rdma/roce or rdma/verbs in the place
// of rdmatest it connects to any other.
func Example() {
	addr := netip.MustParseAddrPort("192.0.2.1:4420")
	fabric := rdmatest.NewFabric()
	t, err := target.New(target.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer t.Close()
	if _, err := t.AddPorts(target.PortConfig{Provider: fabric.Provider(addr.Addr()), Addr: addr}); err != nil {
		fmt.Println(err)
		return
	}
	s, err := t.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:disk", AllowAny: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(64 << 20)}); err != nil {
		fmt.Println(err)
		return
	}
	loop, err := poller.New(poller.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer loop.Stop()
	ctx, id := context.Background(), nvme.NewUUID()
	sub, err := initiator.Connect(ctx, initiator.Config{
		Path:   initiator.Path{Provider: fabric.Provider(netip.MustParseAddr("192.0.2.2")), Address: addr},
		SubNQN: s.NQN(), HostNQN: nvme.UUIDNQN(id), HostID: id,
		Queues: poller.Request{IO: 1}, Loops: []*poller.Loop{loop},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, ns := range sub.Namespaces() {
		fmt.Println(ns.NSID(), ns.Geometry().Sectors) // a block.Device
	}
	fmt.Println(sub.Info().State, sub.Close(ctx))
	// Output:
	// 1 131072
	// live <nil>
}
