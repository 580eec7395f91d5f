package rdma_test

import (
	"errors"
	"fmt"
	"net/netip"

	"ublk-nvmeof/rdma"
)

// The error of a connection names the step, the peer and the cause.
func ExampleStepError() {
	err := error(&rdma.StepError{Step: "resolve address", Peer: netip.MustParseAddrPort("192.0.2.1:4420"), Err: rdma.ErrNoDevice})
	fmt.Println(err)
	fmt.Println(errors.Is(err, rdma.ErrNoDevice))
	// Output:
	// resolve address 192.0.2.1:4420: rdma: no RDMA device
	// true
}
