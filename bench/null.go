package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/ublk"
)

// nullMain serves a ublk device without a back end, with QUEUES queues and SIZE
// MiB, prints its node and ends by a signal.
func nullMain(ctx context.Context, args []string) (err error) {
	if len(args) != 2 {
		return errors.New("usage: null QUEUES SIZE")
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
	device, err := ublk.Start(ctx, ublk.Config{ID: -1, Device: back, Loops: loops})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, device.Path())
	select {
	case <-ctx.Done():
	case <-device.Done():
		return device.Err()
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
	defer cancel()
	return device.Stop(stop, false)
}
