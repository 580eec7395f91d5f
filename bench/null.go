package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/ublk"
)

// nullMain serves a ublk device without a back end, with QUEUES queues and SIZE
// MiB, prints its node and ends by a signal. With a third argument, it shares memory in pages of
// that kind (small or huge) with the users of the device, and prints its file as well.
func nullMain(ctx context.Context, args []string) (err error) {
	if len(args) != 2 && len(args) != 3 {
		return errors.New("usage: null QUEUES SIZE [small|huge]")
	}
	queues, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	size, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return err
	}
	back, err := null.New(null.Config{Geometry: block.Geometry{Sectors: size << 20 >> block.SectorShift}})
	if err != nil {
		return err
	}
	var loops []*poller.Loop
	defer func() {
		for _, l := range loops {
			err = errors.Join(err, l.Stop())
		}
	}()
	for i := range queues {
		l, err := poller.New(poller.Config{Name: "null " + strconv.Itoa(i)})
		if err != nil {
			return err
		}
		loops = append(loops, l)
	}
	device, err := ublk.Start(ctx, ublk.Config{ID: -1, Device: back, Loops: loops, ShareMemory: len(args) == 3})
	if err != nil {
		return err
	}
	stop := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
		defer cancel()
		return device.Stop(ctx, false)
	}
	shared := ""
	if len(args) == 3 {
		f, err := shareMemory(ctx, device, args[2] == hugePages)
		if err != nil {
			return errors.Join(err, stop())
		}
		defer f.Close()
		shared = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	}
	fmt.Fprintln(os.Stdout, device.Path(), shared)
	select {
	case <-ctx.Done():
	case <-device.Done():
		return device.Err()
	}
	return stop()
}

// shareMemory makes memory that the users of a device share.
func shareMemory(ctx context.Context, device *ublk.Device, huge bool) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge {
		flags |= unix.MFD_HUGETLB
	}
	fd, err := unix.MemfdCreate("shared", flags)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "shared memory")
	err = f.Truncate(sharedMiB << 20)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	}
	if err == nil {
		err = device.Share(ctx, f, nil)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
