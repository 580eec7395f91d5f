package target_test

import (
	"fmt"
	"net/netip"

	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// This target for tests of a host is on a fabric inside the process. It grants two I/O
// queues until the test changes that.
func Example() {
	addr := netip.MustParseAddrPort("192.0.2.1:4420")
	t, err := target.New(target.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer t.Close()
	s, err := t.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:disk", AllowAny: true, MaxQueues: 2})
	if err != nil {
		fmt.Println(err)
		return
	}
	ns, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(64 << 20)})
	if err != nil {
		fmt.Println(err)
		return
	}
	ports, err := t.AddPorts(target.PortConfig{Provider: rdmatest.NewFabric().Provider(addr.Addr()), Addr: addr})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(ports[0].Addr(), s.NQN(), ns.NSID())
	// Output: 192.0.2.1:4420 nqn.2026-01.org.example:disk 1
}
