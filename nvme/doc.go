// Package nvme defines the wire formats of NVMe over Fabrics: commands, completions,
// status codes, SGL descriptors, Fabrics commands and their data, Identify structures,
// features, log pages, and the private data of the RDMA transport. It serves hosts and
// controllers alike, and does no I/O.
//
// # Shape
//
// A structure on the wire is an array of its exact size ([Command] is [64]byte), with
// accessors that read and write it in place. So registered memory is viewed and never
// copied: CommandAt(slab[i*64:]) returns a pointer into the slab. Accessors compile to
// plain loads and stores, and nothing on the I/O path allocates memory. Data of
// variable length (log pages, descriptor lists) is a byte slice and is decoded with
// bounds checks. Each such decoder accepts any bytes and returns an error for wrong
// ones; it never panics.
//
// # Conventions
//
//   - All fields are little endian, as the specifications define them.
//   - Many counts of NVMe are "0's based". A count in a Go signature is the plain
//     number, and the encoding happens here. If the raw field is exposed, its comment
//     says 0-based.
//   - Builders such as [Command.SetRead] write all 64 bytes: command id 0, the flags
//     for SGLs, and a descriptor for "no data". Set the command id and the descriptor
//     afterwards.
//   - An argument of a builder that is outside the range of its field is a bug of the
//     caller and panics, because cutting it down would address the wrong blocks.
//     Values that are read from the wire never cause a panic.
//   - Setters of Identify and log structures exist for the controller side.
//
// # Concurrency
//
// The types have no state of their own. Bytes that are shared with an adapter or
// another goroutine need the ordering that their owner provides.
//
// # Sources
//
// NVM Express Base Specification 2.1, NVM Command Set Specification 1.1, NVMe over
// RDMA Transport Specification 1.1. They are cited as Base, NVM and RDMA, with the name
// of the section or figure, because names change less often than numbers.
package nvme

import "encoding/binary"

var le = binary.LittleEndian
