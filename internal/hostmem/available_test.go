package hostmem

import (
	"math"
	"os"
	"path/filepath"
	"testing"
)

func TestAvailable(t *testing.T) {
	n, err := Available()
	if err != nil || n < 1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// TestGroupAvailable: the tightest group on the way to the root counts.
func TestGroupAvailable(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a/memory.max": "1000\n", "a/memory.current": "400\n",
		"a/b/memory.max": "max\n", "a/b/memory.current": "100\n",
		"full/memory.max": "100\n", "full/memory.current": "200\n",
		"memory/old/memory.limit_in_bytes": "500\n", "memory/old/memory.usage_in_bytes": "100\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for groups, want := range map[string]int64{
		"0::/a/b\n":                 600,
		"0::/full\n":                0,
		"0::/elsewhere\n":           math.MaxInt64,
		"0::/\n":                    math.MaxInt64,
		"5:cpu:/a\n4:memory:/old\n": 400,
		"4:memory:/old\n0::/full\n": 0,
		"nonsense\n":                math.MaxInt64,
		"0::/../../a/b/../b\n":      600,
	} {
		if got := groupAvailable(root, groups); got != want {
			t.Errorf("%q: %d, want %d", groups, got, want)
		}
	}
}
