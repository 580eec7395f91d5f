// Command ublk-nvmeof serves the namespaces of an NVMe over RDMA subsystem as
// ublk block devices, /dev/ublkbN.
//
//	connect     starts a server for a subsystem and returns when its devices are usable
//	disconnect  ends servers
//	list        shows servers and their devices
//	version     says which build this is
//
// connect marks its main thread as an I/O flusher and then starts the server, or
// with --foreground becomes it, by executing this program again with the hidden
// verb serve: the mark passes to a new program, and there to all threads.
package main

import (
	"fmt"
	"os"
	"runtime"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// No run loop may get the main thread: it does not end with its goroutine, and
// would keep the loop's io_uring, and so the ublk device, for ever. It is also
// the thread whose marks a started program inherits.
func init() { runtime.LockOSThread() }

func main() {
	err := execute(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", programName, exit.From(err))
	}
	os.Exit(int(exit.Of(err)))
}
