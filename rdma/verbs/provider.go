//go:build linux && cgo && !noverbs

package verbs

/*
#cgo LDFLAGS: -lrdmacm -libverbs -ldl
#include "shim.h"
*/
import "C"

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// Supported reports whether this build has the provider.
const Supported = true

// Provider implements rdma.Provider with librdmacm. Its methods may be called from any
// goroutine.
type Provider struct{}

// New checks that the connection manager and at least one RDMA device are available. The
// error names the first missing thing.
func New() (*Provider, error) {
	if err := probe(); err != nil {
		return nil, fmt.Errorf("verbs: %w", err)
	}
	return &Provider{}, nil
}

// probe checks the requirements in the order of their dependencies, and opens the
// connection manager once. This also makes librdmacm initialize itself now, which it does
// not protect well against concurrent calls.
func probe() error {
	if _, err := os.Stat("/sys/class/infiniband_verbs"); err != nil {
		return fmt.Errorf("kernel module ib_uverbs is not loaded: %w", err)
	}
	if _, err := os.Stat("/dev/infiniband/rdma_cm"); err != nil {
		return fmt.Errorf("kernel module rdma_ucm is not loaded, or its node is not in this container: %w", err)
	}
	loadDrivers()
	var n C.int
	list, err := C.ibv_get_device_list(&n)
	if list == nil {
		return missing("list RDMA devices", err)
	}
	C.ibv_free_device_list(list)
	if n == 0 {
		return rdma.ErrNoDevice
	}
	channel, err := C.rdma_create_event_channel()
	if channel == nil {
		return missing("open /dev/infiniband/rdma_cm", err)
	}
	C.rdma_destroy_event_channel(channel)
	return nil
}

// missing returns the error of a library call that may not have set errno.
func missing(what string, err error) error {
	if err == nil {
		err = rdma.ErrNoDevice
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Name implements rdma.Provider.
func (*Provider) Name() string { return "verbs" }

// Resolve implements rdma.Provider.
func (*Provider) Resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, tos int) (rdma.ID, error) {
	id, err := newID()
	if err != nil {
		return nil, &rdma.StepError{Step: "open connection to", Peer: remote, Err: err}
	}
	id.remote = remote
	if step, err := id.resolve(ctx, local, remote, tos); err != nil {
		return nil, &rdma.StepError{Step: step, Peer: remote, Err: errors.Join(err, id.Close())}
	}
	return id, nil
}

// slack is the time by which the kernel's own timers outlast the context, so that callers
// get the error of the context.
const slack = time.Second

// timeoutMS returns the remaining time of the context plus slack in milliseconds, for the
// kernel.
func timeoutMS(ctx context.Context) C.int {
	deadline, ok := ctx.Deadline()
	if !ok {
		return math.MaxInt32
	}
	return C.int(min(max(0, time.Until(deadline))+slack, math.MaxInt32*time.Millisecond).Milliseconds())
}

// cmErrno returns the error of a connection manager call or event.
func cmErrno(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w leads there (%w)", rdma.ErrNoDevice, err)
	}
	return err
}
