package ublk_test

import (
	"context"
	"fmt"

	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/ublk"
)

// This makes a disk in memory a block device. It needs the driver and CAP_SYS_ADMIN.
func Example() {
	ctx := context.Background()
	loop, err := poller.New(poller.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer loop.Stop()
	disk, err := ram.New(ram.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer disk.Close()
	device, err := ublk.Start(ctx, ublk.Config{ID: -1, Device: disk, Loops: []*poller.Loop{loop}})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(device.Path())
	fmt.Println(device.Stop(ctx, false))
}
