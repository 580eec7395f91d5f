// Package discovery reads the logs of NVMe over Fabrics discovery services: which
// subsystems a host may use, at which addresses, and which other services know more.
//
// A discovery controller is an initiator.Subsystem that was connected with
// initiator.Config.Discovery; [Open] makes one. [Read] reads its log, [Walk] follows the
// referrals of one service to others, and [Watch] stays connected and reads again whenever
// a controller says that its log has changed.
//
// # Hostile services
//
// A log is what somebody else wrote. Its size, the number of attempts to read it, the depth
// and the number of referrals, and the time for all of it are limited ([Limits]). An entry
// that cannot be used is reported by [Entry.Check] and does no harm to the others. A service
// can still point to anything: whoever connects to an entry decides whether it trusts the
// service, and authentication is a matter of the subsystem that the entry leads to.
package discovery
