package server

import (
	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/initiator"
)

// checkMemory returns an error if the I/O buffers of the namespaces would exceed the
// controller's memory limit. It does not allocate the buffers.
func (s *server) checkMemory(chosen []namespace) error {
	var need int64
	largest := 0
	for _, ns := range chosen {
		maxIO := min(s.opts.MaxIO, int(ns.device.Geometry().MaxIO))
		need += int64(len(s.loops)) * initiator.QueueMemory(s.depth, maxIO)
		largest = max(largest, maxIO)
	}
	memory := s.sub.Info().Memory
	if need <= memory.Limit-memory.Used {
		return nil
	}
	return exit.Errorf(exit.NoMemory, "I/O buffers for %d %s need %s (for each namespace %d %s of %d requests of %s), and %s is available to them; "+
		"lower --queue-size or --max-io-size, choose fewer namespaces with --namespace, or raise --memory-limit",
		len(chosen), english.PluralWord(len(chosen), "namespace", ""), humanize.IBytes(uint64(need)),
		len(s.loops), english.PluralWord(len(s.loops), "queue", ""), s.depth, humanize.IBytes(uint64(largest)),
		humanize.IBytes(uint64(max(0, memory.Limit-memory.Used))))
}
