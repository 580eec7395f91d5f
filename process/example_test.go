package process_test

import (
	"fmt"

	"ublk-nvmeof/process"
)

// A program asks what is missing before it makes loops.
func Example() {
	if err := process.CheckIOUring(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("loops can be made")
	// Output: loops can be made
}
