// Command vmm shows the part of a virtual machine monitor, or of a VM host's agent, that gives the
// disk of an NVMe over Fabrics target to a guest. It prints the partition signature of the disk,
// which it reads itself, and then serves the disk on a socket for vhost-user-blk, over the same
// connection:
//
//	vmm nvmeof+rdma://192.0.2.1/nqn.2026-01.org.example:disk /run/vm1.sock
//
//	qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \
//		-chardev socket,id=c,path=/run/vm1.sock -device vhost-user-blk-pci,chardev=c …
//
// It ends at SIGINT.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"

	"ublk-nvmeof/disk"
	"ublk-nvmeof/vhost"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: vmm URL SOCKET")
		os.Exit(2)
	}
	cfg, err := disk.ParseURL(os.Args[1])
	if err == nil {
		err = serve(ctx, cfg, os.Args[2], os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmm:", err)
		os.Exit(1)
	}
}

// serve serves the disk until ctx is done.
func serve(ctx context.Context, cfg disk.Config, socket string, out io.Writer) (err error) {
	d, err := disk.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := inspect(d, out); err != nil {
		return err
	}
	// The server runs on the loops of the disk, and its guests share the connection.
	server, err := vhost.New(vhost.Config{Device: d.Namespace(), ID: "disk"})
	if err != nil {
		return err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return errors.Join(err, server.Stop(context.Background(), true))
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	for s := range d.States(ctx) {
		fmt.Fprintf(out, "connection %v, %d bytes\n", s.Connection, s.Geometry.Sectors*512)
		if err := server.Changed(); err != nil { // the guest sees a new size
			return errors.Join(err, server.Stop(context.Background(), true))
		}
	}
	return errors.Join(server.Stop(context.Background(), true), <-ended)
}

// inspect reads what the host wants to know of the disk before it starts the guest.
func inspect(d *disk.Disk, out io.Writer) error {
	sector := make([]byte, d.BlockSize())
	if _, err := d.ReadAt(sector, 0); err != nil {
		return err
	}
	kind := "no partition table"
	if sector[510] == 0x55 && sector[511] == 0xAA {
		kind = "a partition table"
	}
	_, err := fmt.Fprintf(out, "disk of %d bytes with %s\n", d.Size(), kind)
	return err
}
