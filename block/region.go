package block

// MaxRegions is the largest number of regions of a device at the same time.
const MaxRegions = 1024

// Registrar is a Device whose requests can have their data in memory of the front end.
type Registrar interface {
	Device
	// Register makes memory a region for the requests of all queues. The memory is off the Go
	// heap, starts at a page, and stays mapped until Close of the region has succeeded. An
	// access to it must not fault: a file that it maps must not shrink. What can access the
	// region until then, beyond what the requests name, is up to the back end, which says so in
	// its documentation. Register must not be called on a loop. After an error the front end
	// can use buffers.
	Register(mem []byte) (Region, error)
}

// Region is memory of a front end that a back end has registered. Its methods may be called from
// any goroutine, but Close not on a loop.
type Region interface {
	// Number is what requests name. It is 1..MaxRegions.
	Number() uint16
	// Close ends the region. Requests that name it and have not begun fail with EFAULT. Close
	// waits until the front end has reaped all requests that name it, and until nothing
	// accesses the memory any more, also not on behalf of requests that have ended. After an
	// error, the memory must stay mapped. Another Close tries again.
	Close() error
}
