package frontend

import (
	"os"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

func TestSizeQueues(t *testing.T) {
	page := os.Getpagesize()
	for _, c := range []struct {
		depth, maxIO int
		ok           bool
	}{
		{0, 0, true}, {16, page, true}, {4096, 1 << 30, true}, {15, page, false}, {-1, 0, false},
		{4097, 0, false}, {0, page - 1, false}, {0, -1, false}, {0, 1<<30 + 1, false},
	} {
		depth, maxIO := c.depth, c.maxIO
		if err := SizeQueues(&depth, &maxIO, 16); (err == nil) != c.ok || c.ok && (depth == 0 || maxIO == 0) {
			t.Errorf("%+v: %d, %d, %v", c, depth, maxIO, err)
		}
	}
}

func TestBufferSize(t *testing.T) {
	page := os.Getpagesize()
	for _, c := range []struct{ maxIO, limit, blocks, want int }{
		{1 << 20, 128 << 10, 1, 128 << 10}, {3*page + 1, 1 << 20, 1, 3 * page},
		{page, 1 << 20, 2, 2 * page}, {page, 512, 1, page},
	} {
		g := block.Geometry{LogicalBlock: uint32(page), MaxIO: uint32(c.limit)}
		if got := BufferSize(c.maxIO, g, c.blocks); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

type looper struct{ block.Device }

func (looper) Loops() []*poller.Loop { return make([]*poller.Loop, 2) }

// TestLoops finds the loops in the configuration first, and then in the device.
func TestLoops(t *testing.T) {
	if got, err := Loops(make([]*poller.Loop, 1), looper{}); len(got) != 1 || err != nil {
		t.Errorf("given: %d, %v", len(got), err)
	}
	if got, err := Loops(nil, looper{}); len(got) != 2 || err != nil {
		t.Errorf("of the device: %d, %v", len(got), err)
	}
	if _, err := Loops(nil, nil); err == nil {
		t.Error("no loops: no error")
	}
}
