package uring

import (
	"encoding/binary"
	"structs"
	"unsafe"
)

// Structures and numbers of include/uapi/linux/io_uring.h

// Op is an opcode, enum io_uring_op. The zero value is IORING_OP_NOP.
type Op = uint8

// Opcodes, with the first kernel that has them
const (
	OpNop           Op = 0
	OpPollAdd       Op = 6  // 5.1; multishot 5.13
	OpPollRemove    Op = 7  // 5.1
	OpSendMsg       Op = 9  // 5.3
	OpRecvMsg       Op = 10 // 5.3
	OpTimeout       Op = 11 // 5.4
	OpAsyncCancel   Op = 14 // 5.5; by file descriptor 5.19
	OpRead          Op = 22 // 5.6
	OpWrite         Op = 23 // 5.6
	OpMsgRing       Op = 40 // 5.18
	OpURingCmd      Op = 46 // 5.19
	OpReadMultishot Op = 49 // 6.7
)

// SQE.Flags (IOSQE_*)
const (
	FixedFile      uint8 = 1 << 0 // FD is an index from FixFile
	IODrain        uint8 = 1 << 1
	IOLink         uint8 = 1 << 2
	BufferSelect   uint8 = 1 << 5 // take a buffer of group BufIndex
	CQESkipSuccess uint8 = 1 << 6 // 5.17
)

// PollAddMulti in SQE.Len of OpPollAdd makes it multishot (IORING_POLL_*).
const PollAddMulti uint32 = 1 << 0 // 5.13

// SQE.OpFlags of OpAsyncCancel (IORING_ASYNC_CANCEL_*)
const (
	CancelAll uint32 = 1 << 0 // 5.19: all matching commands
	CancelFD  uint32 = 1 << 1 // 5.19: match FD, not the user data in Addr
	CancelAny uint32 = 1 << 2 // 5.19: all commands of the ring
)

// CQE.Flags (IORING_CQE_F_*)
const (
	CQEBuffer uint32 = 1 << 0 // the upper 16 bits are a buffer id
	CQEMore   uint32 = 1 << 1 // the command is still active and will make more CQEs
)

// SQE is struct io_uring_sqe, 64 bytes.
type SQE struct {
	_           structs.HostLayout
	Opcode      Op
	Flags       uint8
	IOPrio      uint16
	FD          int32
	Off         uint64 // offset; for OpURingCmd: cmd_op in the low 32 bits (SetCmdOp)
	Addr        uint64
	Len         uint32
	OpFlags     uint32 // rw_flags, poll32_events, cancel_flags, uring_cmd_flags, …
	UserData    uint64
	BufIndex    uint16 // index of a fixed buffer; with BufferSelect: buffer group
	Personality uint16
	SpliceFD    int32    // also file_index
	Cmd         [16]byte // for OpURingCmd: the driver's command
}

// SetCmdOp sets cmd_op of an OpURingCmd.
func (s *SQE) SetCmdOp(op uint32) { *(*[2]uint32)(unsafe.Pointer(&s.Off)) = [2]uint32{op, 0} }

// Cmd80 returns the command area of an entry. The ring must have been made with
// Config.SQE128, because the area extends 64 bytes beyond the SQE.
func (s *SQE) Cmd80() *[80]byte { return (*[80]byte)(unsafe.Pointer(&s.Cmd)) }

// CQE is struct io_uring_cqe, 16 bytes.
type CQE struct {
	_        structs.HostLayout
	UserData uint64
	Res      int32 // result, or -errno
	Flags    uint32
}

// BufID returns the id of the provided buffer that a CQE with these flags has filled. It
// is valid if the flags have CQEBuffer.
func BufID(flags uint32) uint16 { return uint16(flags >> 16) }

// PollMask returns the SQE.OpFlags of OpPollAdd (poll32_events) for a mask of POLLIN etc.
// On a big-endian machine, the kernel needs its halves swapped.
func PollMask(events uint32) uint32 {
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		return events<<16 | events>>16
	}
	return events
}

// IORING_SETUP_*
const (
	setupCQSize       = 1 << 3  // 5.5
	setupClamp        = 1 << 4  // 5.6
	setupSubmitAll    = 1 << 7  // 5.18
	setupTaskrunFlag  = 1 << 9  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1
	setupNoSQArray    = 1 << 16 // 6.6
)

// IORING_FEAT_*
const (
	featSingleMmap = 1 << 0  // 5.4
	featNoDrop     = 1 << 1  // 5.5
	featExtArg     = 1 << 8  // 5.11
	featNoIowait   = 1 << 17 // 6.15
	featRequired   = featSingleMmap | featNoDrop | featExtArg
)

// IORING_ENTER_*
const (
	enterGetEvents      = 1 << 0
	enterExtArg         = 1 << 3 // 5.11
	enterRegisteredRing = 1 << 4 // 5.18
	enterNoIowait       = 1 << 7 // 6.15
)

// IORING_SQ_*, bits of the submission queue's flags word
const (
	sqCQOverflow = 1 << 1 // 5.8
	sqTaskrun    = 1 << 2 // 5.19
)

// IORING_REGISTER_*
const (
	registerFilesUpdate       = 6  // 5.5
	registerProbe             = 8  // 5.6
	registerFiles2            = 13 // 5.13
	registerRingFDs           = 20 // 5.18
	unregisterRingFDs         = 21 // 5.18
	registerPbufRing          = 22 // 5.19
	registerFilesSparse       = 1 << 0
	opSupported               = 1 << 0 // io_uring_probe_op.flags
	offSQRing                 = 0
	offSQEs                   = 0x10000000
	maxOps                    = 256
	removedFD           int32 = -1
)

// params is struct io_uring_params.
type params struct {
	_            structs.HostLayout
	sqEntries    uint32
	cqEntries    uint32
	flags        uint32
	sqThreadCPU  uint32
	sqThreadIdle uint32
	features     uint32
	wqFD         uint32
	resv         [3]uint32
	sqOff        sqOffsets
	cqOff        cqOffsets
}

// sqOffsets is struct io_sqring_offsets.
type sqOffsets struct {
	_                                                              structs.HostLayout
	head, tail, ringMask, ringEntries, flags, dropped, array, resv uint32
	userAddr                                                       uint64
}

// cqOffsets is struct io_cqring_offsets.
type cqOffsets struct {
	_                                                             structs.HostLayout
	head, tail, ringMask, ringEntries, overflow, cqes, flags, rsv uint32
	userAddr                                                      uint64
}

// geteventsArg is struct io_uring_getevents_arg.
type geteventsArg struct {
	_           structs.HostLayout
	sigmask     uint64
	sigmaskSize uint32
	minWaitUsec uint32 // 6.12
	timeout     uint64 // address of a timespec
}

// timespec is struct __kernel_timespec.
type timespec struct {
	_         structs.HostLayout
	sec, nsec int64
}

// rsrcUpdate is struct io_uring_rsrc_update, and struct io_uring_files_update.
type rsrcUpdate struct {
	_      structs.HostLayout
	offset uint32
	resv   uint32
	data   uint64
}

// rsrcRegister is struct io_uring_rsrc_register.
type rsrcRegister struct {
	_          structs.HostLayout
	nr, flags  uint32
	resv       uint64
	data, tags uint64
}

// bufReg is struct io_uring_buf_reg.
type bufReg struct {
	_           structs.HostLayout
	ringAddr    uint64
	ringEntries uint32
	bgid        uint16
	flags       uint16
	resv        [3]uint64
}

// buf is struct io_uring_buf. In the first entry, tail is the tail of the ring.
type buf struct {
	_    structs.HostLayout
	addr uint64
	len  uint32
	bid  uint16
	tail uint16
}

// probe is struct io_uring_probe with room for every opcode.
type probe struct {
	_      structs.HostLayout
	lastOp uint8
	opsLen uint8
	resv   uint16
	resv2  [3]uint32
	ops    [maxOps]probeOp
}

// probeOp is struct io_uring_probe_op.
type probeOp struct {
	_     structs.HostLayout
	op    uint8
	resv  uint8
	flags uint16
	resv2 uint32
}

// Sizes and offsets, checked by the compiler
var (
	_ [64]byte   = [unsafe.Sizeof(SQE{})]byte{}
	_ [4]byte    = [unsafe.Offsetof(SQE{}.FD)]byte{}
	_ [8]byte    = [unsafe.Offsetof(SQE{}.Off)]byte{}
	_ [16]byte   = [unsafe.Offsetof(SQE{}.Addr)]byte{}
	_ [24]byte   = [unsafe.Offsetof(SQE{}.Len)]byte{}
	_ [28]byte   = [unsafe.Offsetof(SQE{}.OpFlags)]byte{}
	_ [32]byte   = [unsafe.Offsetof(SQE{}.UserData)]byte{}
	_ [40]byte   = [unsafe.Offsetof(SQE{}.BufIndex)]byte{}
	_ [44]byte   = [unsafe.Offsetof(SQE{}.SpliceFD)]byte{}
	_ [48]byte   = [unsafe.Offsetof(SQE{}.Cmd)]byte{}
	_ [16]byte   = [unsafe.Sizeof(CQE{})]byte{}
	_ [8]byte    = [unsafe.Offsetof(CQE{}.Res)]byte{}
	_ [12]byte   = [unsafe.Offsetof(CQE{}.Flags)]byte{}
	_ [120]byte  = [unsafe.Sizeof(params{})]byte{}
	_ [20]byte   = [unsafe.Offsetof(params{}.features)]byte{}
	_ [40]byte   = [unsafe.Offsetof(params{}.sqOff)]byte{}
	_ [80]byte   = [unsafe.Offsetof(params{}.cqOff)]byte{}
	_ [40]byte   = [unsafe.Sizeof(sqOffsets{})]byte{}
	_ [24]byte   = [unsafe.Offsetof(sqOffsets{}.array)]byte{}
	_ [40]byte   = [unsafe.Sizeof(cqOffsets{})]byte{}
	_ [20]byte   = [unsafe.Offsetof(cqOffsets{}.cqes)]byte{}
	_ [24]byte   = [unsafe.Sizeof(geteventsArg{})]byte{}
	_ [16]byte   = [unsafe.Offsetof(geteventsArg{}.timeout)]byte{}
	_ [16]byte   = [unsafe.Sizeof(timespec{})]byte{}
	_ [16]byte   = [unsafe.Sizeof(rsrcUpdate{})]byte{}
	_ [8]byte    = [unsafe.Offsetof(rsrcUpdate{}.data)]byte{}
	_ [32]byte   = [unsafe.Sizeof(rsrcRegister{})]byte{}
	_ [40]byte   = [unsafe.Sizeof(bufReg{})]byte{}
	_ [12]byte   = [unsafe.Offsetof(bufReg{}.bgid)]byte{}
	_ [16]byte   = [unsafe.Sizeof(buf{})]byte{}
	_ [12]byte   = [unsafe.Offsetof(buf{}.bid)]byte{}
	_ [14]byte   = [unsafe.Offsetof(buf{}.tail)]byte{}
	_ [2064]byte = [unsafe.Sizeof(probe{})]byte{}
	_ [16]byte   = [unsafe.Offsetof(probe{}.ops)]byte{}
	_ [8]byte    = [unsafe.Sizeof(probeOp{})]byte{}
)
