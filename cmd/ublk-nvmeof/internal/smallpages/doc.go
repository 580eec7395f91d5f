// Package smallpages has the effect of process.UseSmallPages before the Go runtime makes its
// heap. It is imported for this effect only. In builds without cgo, and before Linux 6.18, the import has no effect.
package smallpages
