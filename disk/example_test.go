package disk_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"ublk-nvmeof/block"
	"ublk-nvmeof/disk"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// A program reads and writes the disk of a target. This one is in the same process; without
// Path.Provider, a disk of any target is opened in the same way.
func Example() {
	addr := netip.MustParseAddrPort("192.0.2.1:4420")
	fabric := rdmatest.NewFabric()
	t, err := target.New(target.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer t.Close()
	if _, err := t.AddPorts(target.PortConfig{Provider: fabric.Provider(addr.Addr()), Addr: addr}); err != nil {
		fmt.Println(err)
		return
	}
	s, err := t.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:disk", AllowAny: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(64 << 20)}); err != nil {
		fmt.Println(err)
		return
	}
	d, err := disk.Open(context.Background(), disk.Config{
		NQN:     s.NQN(),
		HostNQN: "nqn.2026-01.org.example:host",
		Paths:   []disk.Path{{Host: "192.0.2.1", Provider: fabric.Provider(netip.MustParseAddr("192.0.2.2"))}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Close()
	p := make([]byte, d.BlockSize())
	copy(p, "hello")
	if _, err := d.WriteAt(p, 4096); err != nil {
		fmt.Println(err)
		return
	}
	if err := d.Flush(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	n, err := d.ReadAt(p, 4096)
	fmt.Printf("%d of %d bytes, %v: %s\n", n, d.Size(), err, p[:5])
	// Output: 512 of 67108864 bytes, <nil>: hello
}

// OpenURL finds out the rest by itself.
func ExampleOpenURL() {
	d, err := disk.OpenURL(context.Background(), "nvmeof+rdma://192.0.2.1/nqn.2026-01.org.example:disk?nsid=1")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Close()
	fmt.Println(d.Size())
}

// A program that wants depth keeps several requests in flight, in registered memory.
func ExampleBatch() {
	addr := netip.MustParseAddrPort("192.0.2.1:4420")
	fabric := rdmatest.NewFabric()
	t, err := target.New(target.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer t.Close()
	if _, err := t.AddPorts(target.PortConfig{Provider: fabric.Provider(addr.Addr()), Addr: addr}); err != nil {
		fmt.Println(err)
		return
	}
	s, err := t.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:disk", AllowAny: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(64 << 20)}); err != nil {
		fmt.Println(err)
		return
	}
	d, err := disk.Open(context.Background(), disk.Config{
		NQN:     s.NQN(),
		HostNQN: "nqn.2026-01.org.example:host",
		Paths:   []disk.Path{{Host: "192.0.2.1", Provider: fabric.Provider(netip.MustParseAddr("192.0.2.2"))}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Close()
	batch, err := d.NewBatch(8)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer batch.Close()
	var reqs []disk.Request
	for i := range batch.Len() {
		copy(batch.Bytes(i), fmt.Sprint("block ", i))
		reqs = append(reqs, disk.Request{Buffer: i, Op: block.OpWrite, Offset: int64(i) * 4096, Length: 4096})
	}
	if err := batch.Submit(reqs...); err != nil {
		fmt.Println(err)
		return
	}
	ended := 0
	var done [8]disk.Completion
	for batch.InFlight() > 0 {
		n, err := batch.Wait(context.Background(), done[:])
		if err != nil {
			fmt.Println(err)
			return
		}
		for _, c := range done[:n] {
			if c.Err != nil {
				fmt.Println(c.Buffer, c.Err)
			}
			ended++
		}
	}
	fmt.Println(ended)
	// Output: 8
}

// An error keeps what the target said.
func ExampleError() {
	err := error(&disk.Error{Op: block.OpRead, Length: 4096, Errno: 121, Status: nvme.StatusLBAOutOfRange})
	var status nvme.Status
	fmt.Println(errors.As(err, &status), status.Code() == nvme.StatusLBAOutOfRange)
	// Output: true true
}
