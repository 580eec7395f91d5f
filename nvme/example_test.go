package nvme_test

import (
	"fmt"

	"ublk-nvmeof/nvme"
)

// A status has a code and flags.
func ExampleStatus() {
	status := nvme.StatusLBAOutOfRange | nvme.StatusDNR
	fmt.Println(status)
	fmt.Println(status.Code() == nvme.StatusLBAOutOfRange, status.DNR())
	fmt.Println(nvme.ValidateNQN("nqn.2026-01.org.example:disk"))
	// Output:
	// nvme status 080h: lba out of range, do not retry
	// true true
	// <nil>
}
