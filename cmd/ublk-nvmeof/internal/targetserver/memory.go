package targetserver

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// budget bounds the memory of namespaces. It counts the sizes of namespaces and not
// the pages that they use: pages are allocated when they are first written.
type budget struct{ limit, promised int64 }

// take adds n bytes to what is promised; n may be negative.
func (b *budget) take(n int64) error {
	if n > b.limit-b.promised {
		return exit.Errorf(exit.Usage, "%s in memory, with the %s of other namespaces and caches, exceed the limit of %s; want less, or a larger --memory-limit",
			options.FormatSize(n), options.FormatSize(b.promised), options.FormatSize(b.limit))
	}
	b.promised += n
	return nil
}

// memoryLimit is the default limit: three quarters of the available memory.
func memoryLimit() int64 { return availableMemory() / 4 * 3 }

// availableMemory is the memory in bytes that this process can still allocate, by
// the machine and by its control groups.
func availableMemory() int64 {
	least := int64(1<<63 - 1)
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		least = int64(info.Totalram) * int64(info.Unit)
	}
	if n, ok := meminfo("/proc/meminfo", "MemAvailable:"); ok {
		least = min(least, n)
	}
	group, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return least
	}
	// Version 2 has one line: 0::/PATH. A limit of any group on the path holds.
	path, ok := strings.CutPrefix(strings.TrimSpace(string(group)), "0::")
	for ; ok; path = filepath.Dir(path) {
		dir := filepath.Join("/sys/fs/cgroup", path)
		limit, err := number(filepath.Join(dir, "memory.max"))
		used, uerr := number(filepath.Join(dir, "memory.current"))
		if err == nil && uerr == nil {
			least = min(least, max(0, limit-used))
		}
		if path == "/" || path == "." {
			break
		}
	}
	return least
}

// meminfo reads a line like "MemAvailable: 12 kB".
func meminfo(file, key string) (int64, bool) {
	f, err := os.Open(file)
	if err != nil {
		return 0, false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if words := strings.Fields(lines.Text()); len(words) == 3 && words[0] == key && words[2] == "kB" {
			n, err := strconv.ParseInt(words[1], 10, 64)
			return n << 10, err == nil
		}
	}
	return 0, false
}

func number(file string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
