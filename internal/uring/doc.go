// Package uring is one io_uring instance over raw system calls. It provides the
// submission and completion queues in shared memory, waiting, provided buffers, and
// fixed files. It does not prepare commands: callers fill in the fields of an SQE.
//
// # Kernel versions
//
// A Loop ring needs Linux 6.1 (IORING_SETUP_DEFER_TASKRUN), any other ring 5.19
// (IORING_SETUP_SUBMIT_ALL and SQE128). Newer features are probed: NO_SQARRAY (6.6),
// READ_MULTISHOT (6.7, Supports), ENTER_NO_IOWAIT (6.15).
//
// # Concurrency
//
// A Ring is used from one goroutine at a time. A Loop ring belongs to the OS thread
// that created it. The kernel refuses any other thread with EEXIST, and it cancels all
// commands of the ring when that thread ends. So the goroutine must be locked to its
// thread from New to Close.
//
// On other rings a command belongs to the thread that submitted it. A goroutine that
// submits and waits should be locked to its thread in the meantime.
//
// # Hazards
//
//  1. The kernel reads and writes memory that an SQE names until the command's
//     last CQE. Only memory outside the Go heap and stack may be named (mmap),
//     or heap memory held by a runtime.Pinner. A Message's own memory is on the
//     heap, whose objects stay where they are: the caller keeps it reachable.
//  2. An SQE is valid until the next Submit or Wait, a CQE until Seen. Both
//     point into memory that Close unmaps.
//  3. A ring keeps the files of its pending commands open as long as its file
//     descriptor, a mapping of it, or a registration of its descriptor in a
//     living thread exists. Close removes all three.
package uring
