//go:build race

package target

import "sync/atomic"

// order tells the race detector what it cannot see: a host may have one queue
// do something after another queue has answered, and that order goes through
// the network.
type order struct{ n atomic.Uint64 }

func (o *order) mark() { o.n.Add(1) }
