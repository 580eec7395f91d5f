// Command ublk-nvmeof serves the namespaces of an NVMe over RDMA subsystem as ublk
// block devices, /dev/ublkbN.
//
//	connect     starts a server for a subsystem and returns when its devices are usable
//	connect-all starts servers for what discovery services list
//	discover    shows what a discovery service lists
//	disconnect  ends servers
//	disconnect-all
//	            ends all servers
//	list        shows servers and their devices; so do list-subsys and show-topology
//	recover     starts a server for the devices of one that died
//	upgrade     replaces running servers by this program
//	gc          removes what dead servers left and nobody can use any more
//	config      shows and writes connections as the configuration of nvme-cli
//	id-ctrl …   show what a controller says of itself (inspect.go)
//	reset       has a server connect again; ns-rescan has it look at the namespaces
//	resv-… …    show and change the reservation of a namespace (reservation.go)
//	target      runs a target for tests and demonstrations
//	version     prints the version of this build
//
// connect marks its main thread as an I/O flusher. It then executes this program
// again with the hidden command serve, which starts the server in the background;
// with --foreground it becomes the server this way. A program inherits the mark of
// the thread that executes it, and all of its threads have it.
package main

import (
	"fmt"
	"io"
	"os"
	"runtime"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	_ "ublk-nvmeof/cmd/ublk-nvmeof/internal/smallpages" // a start touches little of the heap
	_ "ublk-nvmeof/rdma/verbs/prepare"                  // before librdmacm is used
)

// No loop may run on the main thread. That thread does not end with its goroutine, so
// it would keep the loop's io_uring and with it the ublk device until the process ends.
// A program that is executed inherits the marks of this thread, too.
func init() { runtime.LockOSThread() }

func main() { os.Exit(int(run(os.Args[1:], os.Stdout, os.Stderr))) }

// run executes a command line. An error is written to errs as one line, and its code is
// returned.
func run(args []string, out, errs io.Writer) exit.Code {
	err := exit.From(execute(args, out, errs))
	if err != nil {
		fmt.Fprintf(errs, "%s: %s\n", programName, output.Text(err.Message))
		return err.Code
	}
	return exit.OK
}
