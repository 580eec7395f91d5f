//go:build linux && cgo && !noverbs

package main

import (
	"debug/elf"
	"slices"
	"testing"
)

// The program prepares its process for librdmacm.
func TestProcessIsPrepared(t *testing.T) {
	f, err := elf.Open(self())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.ImportedSymbols()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(symbols, func(s elf.ImportedSymbol) bool { return s.Name == "mallopt" }) {
		t.Error("rdma/verbs/prepare is not part of the program")
	}
}
