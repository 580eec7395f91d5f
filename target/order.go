//go:build !race

package target

// order is for builds with the race detector.
type order struct{}

func (*order) mark() {}
