package verbs_test

import (
	"fmt"

	"ublk-nvmeof/rdma/verbs"
)

// The error names what is missing: the build, a module, a device or a right.
func Example() {
	provider, err := verbs.New()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(provider.Name())
}
