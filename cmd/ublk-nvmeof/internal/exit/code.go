// Package exit defines how the command ends: an exit code for each cause of
// failure, and one line that explains it. --help prints the table of codes.
package exit

import (
	"fmt"
	"strings"
	"text/tabwriter"
)

// Code is a process's exit code.
type Code int

// Exit codes. Scripts rely on the numbers, so they do not change.
const (
	OK             Code = 0
	Other          Code = 1
	Usage          Code = 2
	Permission     Code = 3
	NoUblk         Code = 4
	NoRDMA         Code = 5
	Unreachable    Code = 6
	Rejected       Code = 7
	UnknownSubsys  Code = 8
	HostNotAllowed Code = 9
	Timeout        Code = 10
	Negotiation    Code = 11
	DeviceTaken    Code = 12
	AlreadyServed  Code = 13
	Busy           Code = 14
	NotFound       Code = 15
	NoMemory       Code = 16
	NotProved      Code = 17
	nCodes              = 18
)

var meanings = [nCodes]string{
	OK:             "done",
	Other:          "another failure; the message says which",
	Usage:          "wrong flag, value or argument; nothing was done",
	Permission:     "no permission; the message says for what. Devices need root, or CAP_SYS_ADMIN and access to their nodes",
	NoUblk:         "the ublk driver, or the kernel's NBD client, is not there and could not be loaded",
	NoRDMA:         "no RDMA device leads to the target, or its modules are missing",
	Unreachable:    "the address is unknown, or no route leads to it",
	Rejected:       "nobody listens at the address, or the connection was rejected",
	UnknownSubsys:  "the target has no such subsystem",
	HostNotAllowed: "the subsystem does not admit this host",
	Timeout:        "no answer in time",
	Negotiation:    "host and target could not agree, for example because no I/O queue was granted, or the target refused a command",
	DeviceTaken:    "the device number is taken",
	AlreadyServed:  "already connected",
	Busy:           "the device is in use, or its controller is not connected at the moment",
	NotFound:       "no such device, controller or namespace",
	NoMemory:       "the I/O buffers need more memory than they may have; the message says how much",
	NotProved:      "host and target did not prove to each other who they are: a key is missing or wrong, or the authentication was disturbed",
}

// String returns the meaning of the code.
func (c Code) String() string {
	if c >= 0 && c < nCodes {
		return meanings[c]
	}
	return fmt.Sprintf("exit code %d", int(c))
}

// MayPass reports whether the cause may pass without a change of the command line or of
// this machine: the target is not there, or does not serve this host yet.
func (c Code) MayPass() bool {
	switch c {
	case NoRDMA, Unreachable, Rejected, UnknownSubsys, HostNotAllowed, Timeout, Negotiation, NotFound:
		return true
	}
	return false
}

// Table returns all codes with their meanings, one in a line, for --help.
func Table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	for c := range nCodes {
		fmt.Fprintf(w, "%d\t  %s\n", c, Code(c))
	}
	_ = w.Flush() // a strings.Builder takes all
	return strings.TrimRight(b.String(), "\n")
}
