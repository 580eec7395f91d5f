package nvme

import "fmt"

// CommandSize is the size of a submission queue entry in bytes.
const CommandSize = 64

// PSDTSGL in the flags means that the data pointer is an SGL, and that metadata, if any,
// is addressed by a plain pointer. Fabrics commands always have it.
const PSDTSGL = 0x40

// MaxBlocks is the largest number of logical blocks of one command.
const MaxBlocks = 1 << 16

// NSIDAll addresses every namespace of a controller.
const NSIDAll = 0xFFFFFFFF

// Opcode is byte 0 of a command. Admin and I/O queues have separate opcodes. Fabrics
// commands (OpFabrics) are allowed on both.
type Opcode uint8

// I/O commands of the NVM and zoned command sets.
const (
	OpFlush               Opcode = 0x00
	OpWrite               Opcode = 0x01
	OpRead                Opcode = 0x02
	OpWriteUncorrectable  Opcode = 0x04
	OpCompare             Opcode = 0x05
	OpWriteZeroes         Opcode = 0x08
	OpDSM                 Opcode = 0x09
	OpVerify              Opcode = 0x0C
	OpReservationRegister Opcode = 0x0D
	OpReservationReport   Opcode = 0x0E
	OpReservationAcquire  Opcode = 0x11
	OpReservationRelease  Opcode = 0x15
	OpCopy                Opcode = 0x19
	OpZoneManagementSend  Opcode = 0x79
	OpZoneManagementRecv  Opcode = 0x7A
	OpZoneAppend          Opcode = 0x7D
)

// Admin commands.
const (
	AdminGetLogPage          Opcode = 0x02
	AdminIdentify            Opcode = 0x06
	AdminAbort               Opcode = 0x08
	AdminSetFeatures         Opcode = 0x09
	AdminGetFeatures         Opcode = 0x0A
	AdminAsyncEvent          Opcode = 0x0C
	AdminNamespaceManagement Opcode = 0x0D
	AdminNamespaceAttachment Opcode = 0x15
	AdminKeepAlive           Opcode = 0x18
	AdminFormatNVM           Opcode = 0x80
	AdminSanitize            Opcode = 0x84
)

// OpFabrics is the opcode of every Fabrics command; see [FCType].
const OpFabrics Opcode = 0x7F

// String returns the opcode in hex, because its name depends on the queue. See
// [Opcode.AdminString] and [Opcode.IOString].
func (o Opcode) String() string { return fmt.Sprintf("%02xh", uint8(o)) }

// AdminString returns the name of the opcode on an admin queue.
func (o Opcode) AdminString() string {
	switch o {
	case AdminGetLogPage:
		return "get log page"
	case AdminIdentify:
		return "identify"
	case AdminAbort:
		return "abort"
	case AdminSetFeatures:
		return "set features"
	case AdminGetFeatures:
		return "get features"
	case AdminAsyncEvent:
		return "async event request"
	case AdminNamespaceManagement:
		return "namespace management"
	case AdminNamespaceAttachment:
		return "namespace attachment"
	case AdminKeepAlive:
		return "keep alive"
	case AdminFormatNVM:
		return "format nvm"
	case AdminSanitize:
		return "sanitize"
	case OpFabrics:
		return "fabrics"
	}
	return "admin opcode " + o.String()
}

// IOString returns the name of the opcode on an I/O queue.
func (o Opcode) IOString() string {
	switch o {
	case OpFlush:
		return "flush"
	case OpWrite:
		return "write"
	case OpRead:
		return "read"
	case OpWriteUncorrectable:
		return "write uncorrectable"
	case OpCompare:
		return "compare"
	case OpWriteZeroes:
		return "write zeroes"
	case OpDSM:
		return "dataset management"
	case OpVerify:
		return "verify"
	case OpReservationRegister:
		return "reservation register"
	case OpReservationReport:
		return "reservation report"
	case OpReservationAcquire:
		return "reservation acquire"
	case OpReservationRelease:
		return "reservation release"
	case OpCopy:
		return "copy"
	case OpZoneManagementSend:
		return "zone management send"
	case OpZoneManagementRecv:
		return "zone management receive"
	case OpZoneAppend:
		return "zone append"
	case OpFabrics:
		return "fabrics"
	}
	return "i/o opcode " + o.String()
}

// Command is a submission queue entry (Base, "Submission Queue Entry").
//
//	 0 opcode   1 flags   2 command id
//	 4 nsid (Fabrics: byte 4 is the FCType)
//	 8 cdw2, cdw3   16 metadata pointer   24 SGL descriptor
//	40 cdw10 .. 60 cdw15
type Command [CommandSize]byte

// CommandAt returns the first 64 bytes of b as a command, without a copy. It panics if b
// is shorter.
func CommandAt(b []byte) *Command { return (*Command)(b[:CommandSize:CommandSize]) }

// Opcode returns byte 0.
func (c *Command) Opcode() Opcode { return Opcode(c[0]) }

// SetOpcode sets byte 0.
func (c *Command) SetOpcode(o Opcode) { c[0] = byte(o) }

// Flags returns byte 1: FUSE in bits 0-1 and PSDT in bits 6-7.
func (c *Command) Flags() uint8 { return c[1] }

// SetFlags sets byte 1.
func (c *Command) SetFlags(f uint8) { c[1] = f }

// CID returns the command id.
func (c *Command) CID() uint16 { return le.Uint16(c[2:4]) }

// SetCID sets the command id.
func (c *Command) SetCID(id uint16) { le.PutUint16(c[2:4], id) }

// FCType returns byte 4. It is valid if the opcode is OpFabrics.
func (c *Command) FCType() FCType { return FCType(c[4]) }

// SetFCType sets byte 4.
func (c *Command) SetFCType(t FCType) { c[4] = byte(t) }

// NSID returns the namespace id; 0 means none.
func (c *Command) NSID() uint32 { return le.Uint32(c[4:8]) }

// SetNSID sets the namespace id.
func (c *Command) SetNSID(id uint32) { le.PutUint32(c[4:8], id) }

// CDW2 returns command dword 2.
func (c *Command) CDW2() uint32 { return le.Uint32(c[8:12]) }

// SetCDW2 sets command dword 2.
func (c *Command) SetCDW2(v uint32) { le.PutUint32(c[8:12], v) }

// CDW3 returns command dword 3.
func (c *Command) CDW3() uint32 { return le.Uint32(c[12:16]) }

// SetCDW3 sets command dword 3.
func (c *Command) SetCDW3(v uint32) { le.PutUint32(c[12:16], v) }

// MPTR returns the metadata pointer.
func (c *Command) MPTR() uint64 { return le.Uint64(c[16:24]) }

// SetMPTR sets the metadata pointer.
func (c *Command) SetMPTR(v uint64) { le.PutUint64(c[16:24], v) }

// CDW10 returns command dword 10.
func (c *Command) CDW10() uint32 { return le.Uint32(c[40:44]) }

// CDW11 returns command dword 11.
func (c *Command) CDW11() uint32 { return le.Uint32(c[44:48]) }

// CDW12 returns command dword 12.
func (c *Command) CDW12() uint32 { return le.Uint32(c[48:52]) }

// CDW13 returns command dword 13.
func (c *Command) CDW13() uint32 { return le.Uint32(c[52:56]) }

// CDW14 returns command dword 14.
func (c *Command) CDW14() uint32 { return le.Uint32(c[56:60]) }

// CDW15 returns command dword 15.
func (c *Command) CDW15() uint32 { return le.Uint32(c[60:64]) }

// SetCDW10 sets command dword 10.
func (c *Command) SetCDW10(v uint32) { le.PutUint32(c[40:44], v) }

// SetCDW11 sets command dword 11.
func (c *Command) SetCDW11(v uint32) { le.PutUint32(c[44:48], v) }

// SetCDW12 sets command dword 12.
func (c *Command) SetCDW12(v uint32) { le.PutUint32(c[48:52], v) }

// SetCDW13 sets command dword 13.
func (c *Command) SetCDW13(v uint32) { le.PutUint32(c[52:56], v) }

// SetCDW14 sets command dword 14.
func (c *Command) SetCDW14(v uint32) { le.PutUint32(c[56:60], v) }

// SetCDW15 sets command dword 15.
func (c *Command) SetCDW15(v uint32) { le.PutUint32(c[60:64], v) }

// IsWrite reports whether the command moves data, if it moves any, from host
// to controller: bit 0 of the opcode, or of the Fabrics command type. No
// command here moves data both ways.
func IsWrite(c *Command) bool {
	if c.Opcode() == OpFabrics {
		return c[4]&1 != 0
	}
	return c[0]&1 != 0
}

// fill writes the whole command as eight words. dw10 holds CDW10 in its low half and
// CDW11 in its high half. dw12 and dw14 are composed in the same way.
func (c *Command) fill(op Opcode, nsid uint32, dw10, dw12, dw14 uint64) {
	le.PutUint64(c[0:8], uint64(op)|PSDTSGL<<8|uint64(nsid)<<32)
	le.PutUint64(c[8:16], 0)
	le.PutUint64(c[16:24], 0)
	le.PutUint64(c[24:32], 0)
	le.PutUint64(c[32:40], uint64(SGLKeyed)<<56)
	le.PutUint64(c[40:48], dw10)
	le.PutUint64(c[48:56], dw12)
	le.PutUint64(c[56:64], dw14)
}

// Bits of command dword 12 of Read, Write and Write Zeroes (NVM).
const (
	rwDEAC         = 1 << 25 // Write Zeroes: the controller may deallocate
	rwFUA          = 1 << 30
	rwLimitedRetry = 1 << 31
)

func (c *Command) fillRW(op Opcode, nsid uint32, slba uint64, nlb uint32, fua bool, bits uint64) {
	if nlb-1 >= MaxBlocks {
		panic("nvme: number of blocks outside 1..65536")
	}
	if fua {
		bits |= rwFUA
	}
	c.fill(op, nsid, slba, uint64(nlb-1)|bits, 0)
}

// SetRead builds a Read of nlb (1..65536) logical blocks from slba. With fua, the data
// must come from non-volatile media.
func (c *Command) SetRead(nsid uint32, slba uint64, nlb uint32, fua bool) {
	c.fillRW(OpRead, nsid, slba, nlb, fua, 0)
}

// SetWrite builds a Write of nlb (1..65536) logical blocks at slba. With fua, the data
// must be on non-volatile media before the command completes.
func (c *Command) SetWrite(nsid uint32, slba uint64, nlb uint32, fua bool) {
	c.fillRW(OpWrite, nsid, slba, nlb, fua, 0)
}

// SetWriteZeroes builds a Write Zeroes of nlb (1..65536) logical blocks at slba. With
// deac, the controller may deallocate the blocks, as long as they read as zeroes. The
// command transfers no data.
func (c *Command) SetWriteZeroes(nsid uint32, slba uint64, nlb uint32, fua, deac bool) {
	var bits uint64
	if deac {
		bits = rwDEAC
	}
	c.fillRW(OpWriteZeroes, nsid, slba, nlb, fua, bits)
}

// SetFlush builds a Flush of one namespace, or of all with NSIDAll.
func (c *Command) SetFlush(nsid uint32) { c.fill(OpFlush, nsid, 0, 0, 0) }

// SLBA returns the starting block of a Read, Write, Compare or Write Zeroes.
func (c *Command) SLBA() uint64 { return le.Uint64(c[40:48]) }

// NLB returns the number of blocks, 1..65536, of a Read, Write, Compare or
// Write Zeroes.
func (c *Command) NLB() uint32 { return uint32(le.Uint16(c[48:50])) + 1 }

// FUA returns the force unit access bit of a Read, Write or Write Zeroes.
func (c *Command) FUA() bool { return c.CDW12()&rwFUA != 0 }

// SetLimitedRetry asks the controller to limit its retries in a Read or Write.
func (c *Command) SetLimitedRetry() { c.SetCDW12(c.CDW12() | rwLimitedRetry) }

// DEAC returns the deallocate bit of a Write Zeroes.
func (c *Command) DEAC() bool { return c.CDW12()&rwDEAC != 0 }

// Dataset Management (NVM).
const (
	// DSMRangeSize is the size of one range in bytes.
	DSMRangeSize = 16
	// MaxDSMRanges is the largest number of ranges in one command.
	MaxDSMRanges = 256

	dsmDeallocate = 1 << 2
)

// SetDSM builds a Dataset Management command that deallocates nr (1..256)
// ranges. The data are nr ranges written by [PutDSMRange].
func (c *Command) SetDSM(nsid, nr uint32) {
	if nr-1 >= MaxDSMRanges {
		panic("nvme: number of ranges outside 1..256")
	}
	c.fill(OpDSM, nsid, uint64(nr-1)|dsmDeallocate<<32, 0, 0)
}

// DSMRanges returns the number of ranges, 1..256, of a Dataset Management
// command.
func (c *Command) DSMRanges() uint32 { return uint32(c[40]) + 1 }

// DSMDeallocate reports whether a Dataset Management command deallocates. The
// other attributes are hints.
func (c *Command) DSMDeallocate() bool { return c.CDW11()&dsmDeallocate != 0 }

// PutDSMRange writes a range of nlb blocks (not 0-based) from slba to the first 16 bytes
// of b. It panics if b is shorter.
func PutDSMRange(b []byte, cattr, nlb uint32, slba uint64) {
	_ = b[DSMRangeSize-1]
	le.PutUint32(b[0:4], cattr)
	le.PutUint32(b[4:8], nlb)
	le.PutUint64(b[8:16], slba)
}

// DSMRange reads a range from the first 16 bytes of b. It panics if b is shorter.
func DSMRange(b []byte) (cattr, nlb uint32, slba uint64) {
	_ = b[DSMRangeSize-1]
	return le.Uint32(b[0:4]), le.Uint32(b[4:8]), le.Uint64(b[8:16])
}

// SetIdentify builds an Identify of structure cns. csi selects the I/O command set if the
// structure depends on it. The data are 4096 bytes.
func (c *Command) SetIdentify(cns uint8, nsid uint32, csi uint8) {
	c.fill(AdminIdentify, nsid, uint64(cns)|uint64(csi)<<56, 0, 0)
}

// CNS returns the structure that an Identify requests.
func (c *Command) CNS() uint8 { return c[40] }

// IdentifyCNTID returns the controller id of an Identify.
func (c *Command) IdentifyCNTID() uint16 { return le.Uint16(c[42:44]) }

// IdentifyCSI returns the command set of an Identify.
func (c *Command) IdentifyCSI() uint8 { return c[47] }

// SetSetFeatures builds a Set Features with the value in cdw11, not saved
// across resets.
func (c *Command) SetSetFeatures(fid uint8, cdw11 uint32) {
	c.fill(AdminSetFeatures, 0, uint64(fid)|uint64(cdw11)<<32, 0, 0)
}

// SetGetFeatures builds a Get Features of the current value.
func (c *Command) SetGetFeatures(fid uint8) {
	c.fill(AdminGetFeatures, 0, uint64(fid), 0, 0)
}

// FeatureID returns the feature of a Set or Get Features.
func (c *Command) FeatureID() uint8 { return c[40] }

// SetGetLogPage builds a Get Log Page of lengthBytes bytes (a multiple of 4, not 0) from
// byte offset (a multiple of 4) of log lid. With rae, the read does not clear the
// asynchronous event that announced the log. It panics if the length or the offset is
// invalid.
func (c *Command) SetGetLogPage(lid uint8, nsid uint32, lengthBytes uint32, offset uint64, rae bool) {
	if lengthBytes == 0 || lengthBytes%4 != 0 || offset%4 != 0 {
		panic("nvme: log page length and offset must be whole dwords")
	}
	numd := uint64(lengthBytes/4 - 1)
	dw10 := uint64(lid) | numd<<16 // the upper half of NUMD is in CDW11
	if rae {
		dw10 |= 1 << 15
	}
	c.fill(AdminGetLogPage, nsid, dw10, offset, 0)
}

// LogPage returns the fields of a Get Log Page. length is in bytes, at most 16 GiB.
// offset is in bytes, or in entries if the index offset bit of CDW14 is set.
func (c *Command) LogPage() (lid uint8, length, offset uint64, rae bool) {
	numd := uint64(le.Uint32(c[42:46]))
	return c[40], (numd + 1) * 4, le.Uint64(c[48:56]), c[41]&0x80 != 0
}

// LogSpecific returns the log specific parameter (LSP) of a Get Log Page, 7 bits.
func (c *Command) LogSpecific() uint8 { return c[41] & 0x7f }

// SetLogSpecific sets the log specific parameter of a Get Log Page, 7 bits.
func (c *Command) SetLogSpecific(v uint8) { c[41] = c[41]&0x80 | v&0x7f }

// SetAsyncEvent builds an Asynchronous Event Request.
func (c *Command) SetAsyncEvent() { c.fill(AdminAsyncEvent, 0, 0, 0, 0) }

// SetKeepAlive builds a Keep Alive.
func (c *Command) SetKeepAlive() { c.fill(AdminKeepAlive, 0, 0, 0, 0) }

// SetAbort builds an Abort of command cid on submission queue sqid.
func (c *Command) SetAbort(sqid, cid uint16) {
	c.fill(AdminAbort, 0, uint64(sqid)|uint64(cid)<<16, 0, 0)
}

// AbortTarget returns the command that an Abort names.
func (c *Command) AbortTarget() (sqid, cid uint16) {
	return le.Uint16(c[40:42]), le.Uint16(c[42:44])
}

// String returns a description of the command for logs: opcode, command id, namespace,
// dwords 10 to 15 and data descriptor.
func (c *Command) String() string {
	if c.Opcode() == OpFabrics {
		return fmt.Sprintf("fabrics %v cid %04xh cdw10 %08x %08x %08x %08x sgl {%v}",
			c.FCType(), c.CID(), c.CDW10(), c.CDW11(), c.CDW12(), c.CDW13(), c.SGL())
	}
	return fmt.Sprintf("opcode %v cid %04xh nsid %d cdw10 %08x %08x %08x %08x %08x %08x sgl {%v}",
		c.Opcode(), c.CID(), c.NSID(), c.CDW10(), c.CDW11(), c.CDW12(), c.CDW13(), c.CDW14(), c.CDW15(), c.SGL())
}
