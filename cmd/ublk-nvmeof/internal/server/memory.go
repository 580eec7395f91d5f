package server

import (
	"github.com/dustin/go-humanize"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// checkMemory computes what the I/O buffers of namespaces take, before any is taken,
// and refuses what the controller may not use.
func (s *server) checkMemory(chosen []namespace) error {
	var need int64
	largest := 0
	for _, ns := range chosen {
		maxIO := min(s.opts.MaxIO, int(ns.device.Geometry().MaxIO))
		need += int64(len(s.loops)) * int64(s.depth) * int64(maxIO)
		largest = max(largest, maxIO)
	}
	memory := s.ctrl.Info().Memory
	if need <= memory.Limit-memory.Used {
		return nil
	}
	return exit.Errorf(exit.NoMemory, "I/O buffers for %d namespaces need %s (each %d queues of %d requests of %s), and %s is available to them; "+
		"lower --queue-size or --max-io-size, choose fewer namespaces with --namespace, or raise --memory-limit",
		len(chosen), humanize.IBytes(uint64(need)), len(s.loops), s.depth, humanize.IBytes(uint64(largest)),
		humanize.IBytes(uint64(max(0, memory.Limit-memory.Used))))
}
