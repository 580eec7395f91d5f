package roce_test

import (
	"fmt"

	"ublk-nvmeof/rdma/roce"
)

// A provider of a host needs neither an RDMA device nor a kernel module nor root.
func Example() {
	provider, err := roce.New(roce.Config{OnDemand: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(provider.Name(), provider.Close())
	// Output: roce <nil>
}
