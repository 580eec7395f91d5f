// Package nvme holds the bytes of NVMe over Fabrics: commands, completions,
// status codes, SGL descriptors, Fabrics commands and their data, Identify
// structures, features, log pages, and the private data of the RDMA transport.
// It serves the host and the controller side alike, and does no I/O.
//
// # Shape
//
// A structure on the wire is an array of its exact size ([Command] is
// [64]byte) with accessors that read and write it in place. So registered
// memory is viewed, never copied: CommandAt(slab[i*64:]) returns a pointer
// into the slab. Accessors compile to plain loads and stores; nothing on the
// I/O path allocates. Data of variable length (log pages, descriptor lists)
// arrives as a byte slice and is walked with bounds checks; every such decoder
// accepts any bytes and answers with an error, never with a panic.
//
// # Conventions
//
//   - All fields are little endian, as the specifications define them.
//   - Many NVMe counts are "0's based". A count in a Go signature is the plain
//     number, and the encoding happens here. Where the raw field is exposed,
//     the comment says 0-based.
//   - Builders such as [Command.SetRead] write all 64 bytes: command id 0, the
//     flags saying that SGLs are used, and a descriptor for "no data". Set the
//     command id and the descriptor afterwards.
//   - A builder argument outside its field's range is a bug of the caller and
//     panics; cutting it down would address the wrong blocks. Values read from
//     the wire never panic.
//   - Setters of Identify and log structures exist for the controller side.
//
// # Concurrency
//
// The types carry no state of their own. Bytes shared with a NIC or another
// goroutine need the ordering that their owner provides.
//
// # Sources
//
// NVM Express Base Specification 2.1, NVM Command Set Specification 1.1, NVMe
// over RDMA Transport Specification 1.1; cited as Base, NVM and RDMA, with the
// name of the section or figure, which outlives its number.
package nvme

import "encoding/binary"

var le = binary.LittleEndian
