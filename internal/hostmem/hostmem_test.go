package hostmem

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMap(t *testing.T) {
	page := os.Getpagesize()
	for _, c := range []struct{ ask, got int }{
		{1, page}, {page, page}, {page + 1, 2 * page}, {hugePage + 1, hugePage + page},
	} {
		b, err := Map(c.ask)
		if err != nil {
			t.Fatalf("map %d: %v", c.ask, err)
		}
		if len(b) != c.got || Addr(b)%uint64(page) != 0 {
			t.Errorf("map %d: %d bytes at %#x, want %d bytes, page aligned", c.ask, len(b), Addr(b), c.got)
		}
		if slices.ContainsFunc(b, func(v byte) bool { return v != 0 }) {
			t.Errorf("map %d: not zeroed", c.ask)
		}
		rss, flags := smaps(t, Addr(b))
		if rss < c.got {
			t.Errorf("map %d: %d bytes resident, want %d", c.ask, rss, c.got)
		}
		if !slices.Contains(flags, "dc") {
			t.Errorf("map %d: flags %v lack dc (do not copy on fork)", c.ask, flags)
		}
		b[0], b[len(b)-1] = 1, 2
		if err := Unmap(b); err != nil {
			t.Error(err)
		}
	}
}

func TestMapErrors(t *testing.T) {
	for _, n := range []int{0, -1} {
		if _, err := Map(n); !errors.Is(err, unix.EINVAL) {
			t.Errorf("map %d: %v, want EINVAL", n, err)
		}
	}
	if _, err := Map(1 << 50); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("map 1 PiB: %v, want ENOMEM", err)
	}
}

// TestPopulate: pages cost memory when they are populated, which keeps what is in them.
func TestPopulate(t *testing.T) {
	const page = 1 << 16 // a multiple of any
	b, err := Reserve(16 * page)
	if err != nil {
		t.Fatal(err)
	}
	if rss, flags := smaps(t, Addr(b)); rss != 0 || !slices.Contains(flags, "dc") {
		t.Errorf("%d bytes resident, flags %v", rss, flags)
	}
	b[4*page] = 7
	if err := Populate(b[4*page : 6*page]); err != nil {
		t.Error(err)
	}
	if rss, _ := smaps(t, Addr(b)); rss < 2*page || rss >= 16*page || b[4*page] != 7 {
		t.Errorf("%d bytes resident, %d", rss, b[4*page])
	}
	if err := Unmap(b); err != nil {
		t.Error(err)
	}
}

// TestHugePages: memory that is only touched has small pages. Populated memory has huge ones, also
// where it was touched before, and keeps what was in it.
func TestHugePages(t *testing.T) {
	b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil || strings.Contains(string(b), "[never]") {
		t.Skipf("no transparent huge pages: %q, %v", b, err)
	}
	b, err = Reserve(3*hugePage + 1)
	if err != nil {
		t.Fatal(err)
	}
	if Addr(b)%hugePage != 0 {
		t.Errorf("the memory begins at %#x, want a multiple of %#x", Addr(b), hugePage)
	}
	b[5] = 7
	if rss, _ := smaps(t, Addr(b)); rss != os.Getpagesize() {
		t.Errorf("%d bytes resident after one was touched, want a page", rss)
	}
	for i := range 2 {
		if err := Populate(b[i*hugePage : (i+1)*hugePage]); err != nil {
			t.Fatal(err)
		}
	}
	if rss, huge := sizeOf(t, Addr(b), "Rss:"), sizeOf(t, Addr(b), "AnonHugePages:"); rss != 2*hugePage || huge != rss || b[5] != 7 {
		t.Errorf("%d bytes resident, %d of them huge, want %d; %d", rss, huge, 2*hugePage, b[5])
	}
	at := Addr(b)
	if err := Unmap(b); err != nil {
		t.Error(err)
	}
	if f := mapping(t, at); f != nil {
		t.Errorf("memory at %#x is still mapped: %v", at, f)
	}
}

// smaps is what the kernel says of the mapping that contains addr: resident
// bytes and VmFlags.
func smaps(t *testing.T, addr uint64) (rss int, flags []string) {
	t.Helper()
	return sizeOf(t, addr, "Rss:"), mapping(t, addr)["VmFlags:"]
}

// sizeOf is a size of the mapping that contains addr, in bytes.
func sizeOf(t *testing.T, addr uint64, name string) int {
	t.Helper()
	f := mapping(t, addr)[name]
	if len(f) != 2 || f[1] != "kB" {
		t.Fatalf("%s of the mapping at %#x is %q", name, addr, f)
	}
	kb, err := strconv.Atoi(f[0])
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// mapping has the words of what the kernel says of the mapping that contains addr, by their name;
// nil: there is none.
func mapping(t *testing.T, addr uint64) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var found map[string][]string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		lo, hi, ok := strings.Cut(f[0], "-")
		switch {
		case ok && found != nil:
			return found
		case ok:
			l, errL := strconv.ParseUint(lo, 16, 64)
			h, errH := strconv.ParseUint(hi, 16, 64)
			if errL == nil && errH == nil && l <= addr && addr < h {
				found = map[string][]string{}
			}
		case found != nil:
			found[f[0]] = f[1:]
		}
	}
	return found
}
