package ram_test

import (
	"fmt"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
)

// This is a disk in memory, of 1 MiB.
func Example() {
	device, err := ram.New(ram.Config{Geometry: block.Geometry{Sectors: 2048}})
	if err != nil {
		fmt.Println(err)
		return
	}
	queue, err := device.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 64 << 10})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer queue.Close()
	var done [1]block.Result
	copy(queue.Buffer(0), "hello")
	queue.Submit([]block.Request{{Op: block.OpWrite, Tag: 0, Sectors: 1}})
	fmt.Println(queue.Reap(done[:]), done[0].Errno)
	// Output: 1 0
}
