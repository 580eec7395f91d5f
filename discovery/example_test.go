package discovery_test

import (
	"context"
	"fmt"
	"net/netip"

	"ublk-nvmeof/discovery"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// A host asks which subsystems it may use.
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
	ctx, id := context.Background(), nvme.NewUUID()
	service, err := discovery.Open(ctx, initiator.Config{
		Path:    initiator.Path{Provider: fabric.Provider(netip.MustParseAddr("192.0.2.2")), Address: addr},
		HostNQN: nvme.UUIDNQN(id), HostID: id,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer service.Close(ctx)
	log, err := discovery.Read(ctx, service, discovery.Limits{})
	if err != nil {
		fmt.Println(err)
		return
	}
	for i := range log.Entries {
		fmt.Println(log.Entries[i].NQN())
	}
	// Output:
	// nqn.2014-08.org.nvmexpress.discovery
	// nqn.2026-01.org.example:disk
}
