package nbd_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/poller"
)

// This serves a disk in memory on a socket, for qemu, nbdcopy and others.
func Example() {
	dir, err := os.MkdirTemp("", "nbd")
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
	disk, err := ram.New(ram.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer disk.Close()
	server, err := nbd.New(nbd.Config{Exports: []nbd.Export{{Name: "disk", Device: disk}}, Loops: []*poller.Loop{loop}})
	if err != nil {
		fmt.Println(err)
		return
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		fmt.Println(err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	client, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	greeting := make([]byte, 8)
	_, err = io.ReadFull(client, greeting)
	fmt.Println(string(greeting), err, client.Close())
	fmt.Println(server.Stop(context.Background(), true), <-ended)
	// Output:
	// NBDMAGIC <nil> <nil>
	// <nil> <nil>
}
