// Command diskcat copies a range of the disk of an NVMe over Fabrics target to its standard
// output:
//
//	diskcat nvmeof+rdma://192.0.2.1/nqn.2026-01.org.example:disk?nsid=1 [OFFSET [LENGTH]]
//
// It needs no RDMA device, no kernel module and no root.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"

	"ublk-nvmeof/disk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "diskcat:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	if len(args) < 1 || len(args) > 3 {
		return errors.New("usage: diskcat URL [OFFSET [LENGTH]]")
	}
	d, err := disk.OpenURL(ctx, args[0])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	span := [2]int64{0, d.Size()} // offset and length
	for i, text := range args[1:] {
		if span[i], err = strconv.ParseInt(text, 0, 64); err != nil {
			return err
		}
	}
	return copyRange(ctx, out, d, span[0], min(span[1], d.Size()-span[0]))
}

// copyRange reads through registered memory, so only the write to out copies.
func copyRange(ctx context.Context, out io.Writer, d *disk.Disk, off, length int64) (err error) {
	b, err := d.Buffer(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for length > 0 {
		n := int(min(length, int64(d.MaxIO())))
		whole := (n + d.BlockSize() - 1) / d.BlockSize() * d.BlockSize()
		if err := b.Read(ctx, whole, off); err != nil {
			return err
		}
		if _, err := out.Write(b.Bytes()[:n]); err != nil {
			return err
		}
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}
