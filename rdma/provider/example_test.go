package provider_test

import (
	"fmt"
	"io"
	"net/netip"

	"ublk-nvmeof/rdma/provider"
)

// No RDMA device leads to this machine itself.
func ExampleFind() {
	p, choice, err := provider.Find(provider.Auto, netip.MustParseAddrPort("127.0.0.1:4420"), netip.Addr{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer p.(io.Closer).Close()
	fmt.Println(choice.Name + ": " + choice.Reason)
	// Output: roce: no RDMA device is on lo, which leads to 127.0.0.1
}
