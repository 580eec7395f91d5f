package poller_test

import (
	"fmt"

	"ublk-nvmeof/poller"
)

// A loop runs functions on its thread, and the sources that are attached to it.
func Example() {
	loop, err := poller.New(poller.Config{Name: "example"})
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = loop.Call(func() { fmt.Println("on the loop") })
	fmt.Println(loop.Stop())
	// Output:
	// on the loop
	// <nil>
}

// A target that grants fewer queues than were asked for still serves all classes.
func ExampleSplit() {
	want := poller.Request{IO: 4, Poll: 2}
	fmt.Println(poller.Split(want, 6))
	fmt.Println(poller.Split(want, 1))
	// Output:
	// 4/0/2 default/read/poll queues of 6 granted, 6 requested
	// 1/0/0 default/read/poll queues of 1 granted, 6 requested
}
