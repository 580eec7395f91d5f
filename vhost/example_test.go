package vhost_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/vhost"
	"ublk-nvmeof/vhost/vhosttest"
)

// This gives a disk in memory to a virtual machine.
func Example() {
	dir, err := os.MkdirTemp("", "vhost")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	loop, err := poller.New(poller.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer loop.Stop()
	disk, err := ram.New(ram.Config{Geometry: block.Geometry{Sectors: 4096}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer disk.Close()
	server, err := vhost.New(vhost.Config{Device: disk, Loops: []*poller.Loop{loop}, ID: "disk"})
	if err != nil {
		fmt.Println(err)
		return
	}
	path := filepath.Join(dir, "socket")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		fmt.Println(err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	front, err := vhosttest.Dial(path) // a virtual machine monitor
	if err != nil {
		fmt.Println(err)
		return
	}
	features, err := front.AskU64(vhosttest.GetFeatures)
	fmt.Println("discard:", features&vhosttest.FeatDiscard != 0, err)
	fmt.Println(front.Close(), server.Stop(context.Background(), true), <-ended)
	// Output:
	// discard: true <nil>
	// <nil> <nil> <nil>
}
