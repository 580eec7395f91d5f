// Package prepare changes the process so that libibverbs and librdmacm survive the removal
// of RDMA devices. The main package of a program imports it for this effect only:
//
//	import _ "ublk-nvmeof/rdma/verbs/prepare"
//
// The changes concern all C code of the process, so the decision is the program's and
// not that of package verbs. They are made before main, when the process has one thread.
// Later they would not reach the threads that have allocated memory before:
//
//   - RDMAV_ALLOW_DISASSOC_DESTROY=1 is set in the C environment unless the variable is
//     set already. Without it, libibverbs does not destroy the objects of a removed
//     device and leaks its half of them. The environment of Go, and so of programs that
//     are started, does not change.
//   - malloc uses a single arena (mallopt with M_ARENA_MAX). librdmacm before version
//     44.12 sorts devices by the difference of their addresses, cut to an int. If they
//     are in several arenas, it may lose a healthy device when another one comes or goes.
//
// In builds without verbs the import has no effect.
package prepare
