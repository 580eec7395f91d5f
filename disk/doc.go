// Package disk reads and writes disks: the namespaces of NVMe over Fabrics targets, and any
// block.Device. A Disk is an io.ReaderAt and an io.WriterAt, for any number of goroutines.
//
// Open connects to a target over one or more paths, and New makes a disk of a block.Device that
// the caller has. Requests continue over another path when one is lost, and wait while there is
// none (Config.FailAfter, Config.GiveUpAfter). Disk.States tells about it.
//
// # Ways to transfer data
//
//   - ReadAt and WriteAt, and their variants with a context, copy between the caller's memory
//     and registered memory. They split what is larger than a buffer.
//   - Buffer is registered memory for one request at a time, without a copy.
//   - Batch is a set of such buffers, whose requests are in flight at the same time and reach
//     the loop with one wake-up. It is for one goroutine that wants depth.
//
// None of them allocates memory, except for errors. Offsets and lengths are multiples of
// Disk.BlockSize, or the error is an *AlignmentError. Nothing is read and written again to round
// them, because that would not be atomic.
//
// # Errors
//
// A request that the device has failed is an *Error, in which errors.As finds the nvme.Status of
// the target, and errors.Is the errno. Requests that fail because there is no path to the
// target have ENOLINK, and those whose namespace is gone ENODEV. After Close the error is
// ErrClosed.
//
// # Order
//
// Calls that overlap in time are executed in any order. A Flush covers the writes that had
// returned when it was called. A write whose path is lost is not sent again before it is known
// that the first copy cannot be executed any more, so no old data overwrites newer data.
//
// # Loops
//
// Each queue has a loop (poller.Loop), which is a thread. A call passes its request to the loop
// with the most free buffers. A call without a context that finds no other one in progress on
// its loop waits in the kernel, because the loop can wake up a thread faster than a goroutine.
// The loop then polls for the next request for a moment, as long as one usually follows, so a
// single caller that reads without pause keeps it busy. An idle disk uses no CPU.
//
// # Process
//
// Importing the package and opening a disk change nothing of the process, except for the
// threads. Package process has what a program may want to change by itself, and package
// rdma/verbs/prepare what a program with RDMA devices should import.
package disk
