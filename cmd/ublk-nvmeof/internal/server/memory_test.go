package server

import (
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// TestMemoryOfManyNamespaces: buffers that need more memory than they may have are
// refused before any is taken, with the figures and the flags.
func TestMemoryOfManyNamespaces(t *testing.T) {
	w := newWorld()
	w.memory, w.nsids = 100<<20, nil
	for nsid := range uint32(1024) {
		w.nsids = append(w.nsids, nsid+1)
	}
	r := begin(t, w, lab(), runDir(t))
	err := <-r.result
	if exit.Of(err) != exit.NoMemory {
		t.Fatalf("%v (%d)", err, exit.Of(err))
	}
	for _, want := range []string{"1024 namespaces", "16 GiB", "100 MiB", "--queue-size", "--max-io-size", "--namespace", "--memory-limit"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %q", want, err)
		}
	}
	for _, e := range w.happened() {
		if strings.HasPrefix(e, "start") {
			t.Errorf("%q happened", e)
		}
	}
}

// One namespace is not "1 namespaces".
func TestMemoryOfOneNamespace(t *testing.T) {
	w := newWorld()
	w.memory = 1 << 20
	w.nsids = []uint32{1}
	r := begin(t, w, lab(), runDir(t))
	if err := <-r.result; err == nil || !strings.Contains(err.Error(), "I/O buffers for 1 namespace need") {
		t.Errorf("%v", err)
	}
}
