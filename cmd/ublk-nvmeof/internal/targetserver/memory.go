package targetserver

import (
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/internal/hostmem"
)

// budget limits the memory of namespaces. It counts the sizes of the namespaces and not
// the pages in use, because pages are allocated when they are first written.
type budget struct{ limit, promised int64 }

// take adds n bytes to promised, or returns an error if that exceeds the limit. n may
// be negative.
func (b *budget) take(n int64) error {
	if n > b.limit-b.promised {
		return exit.Errorf(exit.Usage, "%s in memory, with the %s of other namespaces and caches, exceed the limit of %s; want less, or a larger --memory-limit",
			options.FormatSize(n), options.FormatSize(b.promised), options.FormatSize(b.limit))
	}
	b.promised += n
	return nil
}

// memoryLimit returns the default limit in bytes: three quarters of the available
// memory.
func memoryLimit() (int64, error) {
	available, err := hostmem.Available()
	return available / 4 * 3, err
}
