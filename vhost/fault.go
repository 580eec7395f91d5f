package vhost

import (
	"fmt"
	"unsafe"
)

// Guest memory is a file of the front end, which can truncate it at any time. An access
// beyond its end is a SIGBUS. The loops turn it into a panic (debug.SetPanicOnFault), and
// guard turns that into the end of the session.

// guard is deferred by functions that touch guest memory. After a fault there it ends the
// session, and sets *n to 1 if n is not nil.
func (w *worker) guard(n *int) {
	x := recover()
	if x == nil {
		return
	}
	f, ok := x.(interface{ Addr() uintptr })
	if !ok || w.session == nil || !w.session.maps(f.Addr()) {
		panic(x)
	}
	if n != nil {
		*n = 1
	}
	w.fail(fmt.Errorf("memory of the front end at our address %#x is gone: its file was truncated, or there is no memory for it", f.Addr()))
}

// guarded runs fn, which touches guest memory, on the loop of a worker.
func (w *worker) guarded(fn func() error) (err error) {
	failed := 0
	defer func() {
		if failed != 0 {
			err = errGone
		}
	}()
	defer w.guard(&failed)
	return fn()
}

// contains reports whether an address is within a mapping.
func contains(mem []byte, addr uintptr) bool {
	return addr-uintptr(unsafe.Pointer(unsafe.SliceData(mem))) < uintptr(len(mem))
}
