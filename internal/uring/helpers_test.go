package uring

import (
	"iter"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// requireOrSkip skips for want of a capability, unless UN_REQUIRE lists it.
func requireOrSkip(t *testing.T, capability, why string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("UN_REQUIRE"), ","), capability) {
		t.Fatalf("required %s: %s", capability, why)
	}
	t.Skip(why)
}

func addr(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

func lines(s string) iter.Seq[string] { return strings.SplitSeq(s, "\n") }

func contains(s, sub string) bool { return strings.Contains(s, sub) }
