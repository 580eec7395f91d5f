package output

import (
	"slices"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// TestZeroCopyRow checks what list -v says of zero copy.
func TestZeroCopyRow(t *testing.T) {
	for _, c := range []struct {
		places int
		want   string
	}{
		{0, "memory of guests (1.0 GiB at present)\n"}, // an older server, or nothing is connected
		{1, "memory of guests (1.0 GiB at present); contiguous data is not copied\n"},
		{16, "memory of guests (1.0 GiB at present); data in up to 16 places is not copied\n"},
	} {
		s := plain
		s.Devices = slices.Clone(s.Devices)
		s.Devices[0].Counters.DirectBytes = 3 << 20
		s.ZeroCopy, s.RegionBytes, s.Places = "guests", 1<<30, c.places
		var out strings.Builder
		if err := List(&out, []control.Status{s}, nil, Normal, true); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%d places: %q is not in\n%s", c.places, c.want, out.String())
		}
		if !strings.Contains(out.String(), ", 3.0 MiB not copied, ") {
			t.Errorf("it is not said what was copied:\n%s", out.String())
		}
	}
}
