package block_test

import (
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// A back end checks each request once.
func ExampleRequest_Check() {
	read := block.Request{Op: block.OpRead, Sector: 2040, Sectors: 16}
	fmt.Println(read.Check(4096, 4096, 64<<10) == 0)
	fmt.Println(read.Check(2048, 4096, 64<<10) == unix.EIO)  // beyond the end
	fmt.Println(read.Check(4096, 4096, 4096) == unix.EINVAL) // beyond the buffer
	// Output:
	// true
	// true
	// true
}
