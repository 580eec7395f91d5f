//go:build linux && cgo && !noverbs

package verbs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

func TestDriversOf(t *testing.T) {
	sysfs := t.TempDir()
	for name, d := range map[string]struct{ driver, desc string }{
		"a": {"mlx5_core", "host HCA-1\n"}, "b": {"", "rxe\n"}, "c": {"", "Software iWARP stack\n"}, "d": {"bnxt_en", "x"}, "e": {"strange", "rxedevice\n"},
	} {
		dir := filepath.Join(sysfs, name)
		if err := os.MkdirAll(filepath.Join(dir, "device"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "node_desc"), []byte(d.desc), 0o644); err != nil {
			t.Fatal(err)
		}
		if d.driver != "" {
			if err := os.Symlink("../../bus/pci/drivers/"+d.driver, filepath.Join(dir, "device", "driver")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, want := driversOf(sysfs), []string{"mlx5", "rxe", "siw", "bnxt_re"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := driversOf(filepath.Join(sysfs, "none")); got != nil {
		t.Errorf("%v without devices", got)
	}
}

var libraryFile = regexp.MustCompile(`/libibverbs/lib(\w+)-rdmav\d+\.so`)

// loaded returns the parts of libibverbs that this process has loaded.
func loaded(t *testing.T) (names []string) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range libraryFile.FindAllSubmatch(maps, -1) {
		if name := string(m[1]); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// TestLoadsOnlyWhatIsNeeded: the parts of libibverbs for devices that this host does not have are
// not loaded.
func TestLoadsOnlyWhatIsNeeded(t *testing.T) {
	rxeAddrs(t) // or the test is skipped
	if _, err := New(); err != nil {
		t.Fatal(err)
	}
	want := driversOf(sysfsDevices)
	slices.Sort(want)
	got := loaded(t)
	slices.Sort(got)
	if !slices.Equal(got, slices.Compact(want)) {
		t.Errorf("loaded %v, want %v", got, want)
	}
}
