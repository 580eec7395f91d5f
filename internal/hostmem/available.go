package hostmem

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Available is how many bytes this process could map and use without swapping, by
// what the kernel estimates for the machine (MemAvailable, proc(5)) and by the memory
// limits of the control groups that the process is in.
func Available() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read available memory: %w", err)
	}
	n, err := memAvailable(b)
	if err != nil {
		return 0, err
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return n, nil //nolint:nilerr // a kernel without control groups has no such limit
	}
	return min(n, groupAvailable("/sys/fs/cgroup", string(groups))), nil
}

func memAvailable(meminfo []byte) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(meminfo))
	for lines.Scan() {
		field := strings.Fields(lines.Text())
		if len(field) < 2 || field[0] != "MemAvailable:" {
			continue
		}
		kib, err := strconv.ParseInt(field[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read available memory: %w", err)
		}
		return kib << 10, nil
	}
	return 0, errors.New("read available memory: /proc/meminfo does not name it")
}

// groupAvailable is the least that a control group of the process, or one above it,
// leaves. root is where control groups are mounted, groups the text of
// /proc/self/cgroup. A group without a limit, or that cannot be seen, counts as
// unlimited.
func groupAvailable(root, groups string) int64 {
	least := int64(math.MaxInt64)
	for line := range strings.Lines(groups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, ok := strings.Cut(rest, ":")
		dir, limit, usage := root, "memory.max", "memory.current"
		switch {
		case !ok:
			continue
		case controllers == "memory": // version 1
			dir, limit, usage = filepath.Join(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
		case controllers != "":
			continue
		}
		for path = filepath.Clean("/" + path); ; path = filepath.Dir(path) {
			most, err := readNumber(filepath.Join(dir, path, limit))
			used, usedErr := readNumber(filepath.Join(dir, path, usage))
			if err == nil && usedErr == nil {
				least = min(least, max(0, most-used))
			}
			if path == "/" {
				break
			}
		}
	}
	return least
}

// readNumber reads a file of one number; "max" is none.
func readNumber(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	text := strings.TrimSpace(string(b))
	if text == "max" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseInt(text, 10, 64)
}
