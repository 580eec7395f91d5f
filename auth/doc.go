// Package auth is NVMe in-band authentication: DH-HMAC-CHAP, for the host ([Host]) and for
// the controller ([Controller]). Both are state machines over the messages of the Fabrics
// commands Authentication Send and Authentication Receive. They do no I/O: their caller
// transfers the messages.
//
//	host                          controller
//	Negotiate          ────────►  offered hashes and groups
//	                   ◄────────  Challenge: chosen hash and group, C1, g^x
//	Reply: R1, C2, g^y ────────►  checks R1: the host has the host key
//	checks R2          ◄────────  Success1: R2, the controller has the controller key
//	Success2           ────────►  only if the host wanted that proof
//
// Each side can end a run with a failure, which has a reason ([Reason]).
//
// Each direction has a key of its own ([Key]). A controller that has no controller key can
// authenticate hosts, but a host that has one refuses a controller that does not prove that
// it has it too.
//
// The method is in the NVMe Base specification 2.1, "NVMe In-band Authentication", and the
// groups are in RFC 7919. A secure channel (SC_C) is not supported, because RDMA has none.
//
// # Secrets
//
// Keys are never in errors, and fmt and slog print none. Responses are compared in constant
// time. The exponentiation is that of math/big, because the standard library has no other
// one for these groups. Its time depends on the exponent. An exponent is random and used in
// one run only, so an observer cannot average over several of them.
//
// # Concurrency
//
// A Host and a Controller are each for one goroutine at a time. A run with a large group
// takes tens of milliseconds of processor time, so a loop that serves I/O must not do it.
// Keys do not change, and any goroutine may use them.
package auth
