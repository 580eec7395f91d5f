package ublk

import (
	"structs"
	"unsafe"
)

// The structures and numbers of include/uapi/linux/ublk_cmd.h.

// command is an ioctl-encoded opcode of the control device or of a queue.
type command uint32

const (
	iocWrite = 1 << 30
	iocRead  = 2 << 30

	ctrl   = uint32(unsafe.Sizeof(ctrlCmd{}))<<16 | 'u'<<8
	ctrlR  = command(iocRead | ctrl)
	ctrlRW = command(iocRead | iocWrite | ctrl)
	ioRW   = command(iocRead | iocWrite | uint32(unsafe.Sizeof(ioCmd{}))<<16 | 'u'<<8)
)

// Control commands, with the first kernel that has them in this encoding
const (
	getQueueAffinity command = ctrlR | 0x01  // 6.4
	getDevInfo       command = ctrlR | 0x02  // 6.4
	addDev           command = ctrlRW | 0x04 // 6.4
	delDev           command = ctrlRW | 0x05 // 6.4
	startDev         command = ctrlRW | 0x06 // 6.4
	stopDev          command = ctrlRW | 0x07 // 6.4
	setParams        command = ctrlRW | 0x08 // 6.4
	getParams        command = ctrlR | 0x09  // 6.4
	startRecovery    command = ctrlRW | 0x10 // 6.4
	endRecovery      command = ctrlRW | 0x11 // 6.4
	getFeatures      command = ctrlR | 0x13  // 6.5
	updateSize       command = ctrlRW | 0x15 // 6.16
	quiesceDev       command = ctrlRW | 0x16 // 6.16
	tryStopDev       command = ctrlRW | 0x17 // 7.0
	regBuf           command = ctrlRW | 0x18 // 7.1
	unregBuf         command = ctrlRW | 0x19 // 7.1
)

// Queue commands.
const (
	fetchReq          command = ioRW | 0x20
	commitAndFetchReq command = ioRW | 0x21
)

var commandNames = map[command]string{
	getQueueAffinity: "GET_QUEUE_AFFINITY", getDevInfo: "GET_DEV_INFO", addDev: "ADD_DEV", delDev: "DEL_DEV",
	startDev: "START_DEV", stopDev: "STOP_DEV", setParams: "SET_PARAMS", getFeatures: "GET_FEATURES",
	getParams: "GET_PARAMS", startRecovery: "START_USER_RECOVERY", endRecovery: "END_USER_RECOVERY",
	updateSize: "UPDATE_SIZE", quiesceDev: "QUIESCE_DEV", tryStopDev: "TRY_STOP_DEV", regBuf: "REG_BUF", unregBuf: "UNREG_BUF", fetchReq: "FETCH_REQ", commitAndFetchReq: "COMMIT_AND_FETCH_REQ",
}

func (c command) String() string { return commandNames[c] }

const (
	// anyID in ADD_DEV asks for the next free device number.
	anyID = ^uint32(0)
	// noQueue is the queue number in all commands. GET_QUEUE_AFFINITY has the queue
	// number in data.
	noQueue = ^uint16(0)
	// maxDepth is UBLK_MAX_QUEUE_DEPTH. It determines where the descriptors of a
	// queue are mapped, too.
	maxDepth = 4096
	// maxQueues is UBLK_MAX_NR_QUEUES.
	maxQueues = 4096
	// maxID is the number of minor numbers (MINORBITS in include/linux/kdev_t.h).
	maxID = 1 << 20
)

// ctrlCmd is struct ublksrv_ctrl_cmd, the command area of a control entry.
type ctrlCmd struct {
	_          structs.HostLayout
	devID      uint32
	queueID    uint16
	len        uint16 // of the buffer at addr
	addr       uint64
	data       uint64
	devPathLen uint16 // unprivileged devices only
	_          uint16
	_          uint32
}

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	_             structs.HostLayout
	nrHWQueues    uint16
	queueDepth    uint16
	state         uint16
	ioDescSize    uint16 // 7.3; padding before
	maxIOBufBytes uint32
	devID         uint32
	pid           int32
	_             uint32
	flags         uint64
	serverFlags   uint64 // kept by the driver for the server: the cookie
	ownerUID      uint32
	ownerGID      uint32
	_             [2]uint64
}

// params is the beginning of struct ublk_params, as far as it is used. The driver reads
// len bytes.
type params struct {
	_       structs.HostLayout
	len     uint32
	types   uint32
	basic   paramBasic
	discard paramDiscard
}

// params.types, UBLK_PARAM_TYPE_*.
const (
	paramTypeBasic   = 1 << 0
	paramTypeDiscard = 1 << 1
)

// paramBasic is struct ublk_param_basic.
type paramBasic struct {
	_                  structs.HostLayout
	attrs              uint32
	logicalBlockShift  uint8
	physicalBlockShift uint8
	ioOptShift         uint8
	ioMinShift         uint8
	maxSectors         uint32
	chunkSectors       uint32
	devSectors         uint64
	virtBoundaryMask   uint64
}

// paramBasic.attrs, UBLK_ATTR_*.
const (
	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3
)

// paramDiscard is struct ublk_param_discard.
type paramDiscard struct {
	_                structs.HostLayout
	alignment        uint32
	granularity      uint32
	maxSectors       uint32
	maxZeroesSectors uint32
	maxSegments      uint16
	_                uint16
}

// shmemBuf is struct ublk_shmem_buf_reg, memory that the driver shares with the server.
type shmemBuf struct {
	_     structs.HostLayout
	addr  uint64
	len   uint64
	flags uint32
	_     uint32
}

// ioCmd is struct ublksrv_io_cmd, the command area of a queue entry.
type ioCmd struct {
	_      structs.HostLayout
	queue  uint16
	tag    uint16
	result int32
	addr   uint64 // of the tag's buffer
}

// ioDesc is struct ublksrv_io_desc, the description of a request in memory that the driver
// shares with the server.
type ioDesc struct {
	_           structs.HostLayout
	opFlags     uint32
	nrSectors   uint32
	startSector uint64 // always in units of 512 bytes
	addr        uint64 // with flagShmem: index of the buffer in bits 32 to 47, offset in it below
}

// sharedOffset returns the offset of the data in shared memory.
func (d *ioDesc) sharedOffset() uint64 { return d.addr & (1<<32 - 1) }

// ioDesc.opFlags: UBLK_IO_OP_* in the low 8 bits and UBLK_IO_F_* above
const (
	opMask        = 0xff
	opRead        = 0
	opWrite       = 1
	opFlush       = 2
	opDiscard     = 3
	opWriteZeroes = 5
	flagFUA       = 1 << 13
	flagNoUnmap   = 1 << 15
	flagShmem     = 1 << 19
)

// Sizes and offsets, checked by the compiler
var (
	_ [32]byte = [unsafe.Sizeof(ctrlCmd{})]byte{}
	_ [4]byte  = [unsafe.Offsetof(ctrlCmd{}.queueID)]byte{}
	_ [6]byte  = [unsafe.Offsetof(ctrlCmd{}.len)]byte{}
	_ [8]byte  = [unsafe.Offsetof(ctrlCmd{}.addr)]byte{}
	_ [16]byte = [unsafe.Offsetof(ctrlCmd{}.data)]byte{}
	_ [24]byte = [unsafe.Offsetof(ctrlCmd{}.devPathLen)]byte{}
	_ [64]byte = [unsafe.Sizeof(devInfo{})]byte{}
	_ [4]byte  = [unsafe.Offsetof(devInfo{}.state)]byte{}
	_ [8]byte  = [unsafe.Offsetof(devInfo{}.maxIOBufBytes)]byte{}
	_ [12]byte = [unsafe.Offsetof(devInfo{}.devID)]byte{}
	_ [16]byte = [unsafe.Offsetof(devInfo{}.pid)]byte{}
	_ [24]byte = [unsafe.Offsetof(devInfo{}.flags)]byte{}
	_ [32]byte = [unsafe.Offsetof(devInfo{}.serverFlags)]byte{}
	_ [40]byte = [unsafe.Offsetof(devInfo{}.ownerUID)]byte{}
	_ [8]byte  = [unsafe.Offsetof(params{}.basic)]byte{}
	_ [40]byte = [unsafe.Offsetof(params{}.discard)]byte{}
	_ [32]byte = [unsafe.Sizeof(paramBasic{})]byte{}
	_ [4]byte  = [unsafe.Offsetof(paramBasic{}.logicalBlockShift)]byte{}
	_ [8]byte  = [unsafe.Offsetof(paramBasic{}.maxSectors)]byte{}
	_ [16]byte = [unsafe.Offsetof(paramBasic{}.devSectors)]byte{}
	_ [20]byte = [unsafe.Sizeof(paramDiscard{})]byte{}
	_ [8]byte  = [unsafe.Offsetof(paramDiscard{}.maxSectors)]byte{}
	_ [24]byte = [unsafe.Sizeof(shmemBuf{})]byte{}
	_ [8]byte  = [unsafe.Offsetof(shmemBuf{}.len)]byte{}
	_ [16]byte = [unsafe.Offsetof(shmemBuf{}.flags)]byte{}
	_ [16]byte = [unsafe.Sizeof(ioCmd{})]byte{}
	_ [4]byte  = [unsafe.Offsetof(ioCmd{}.result)]byte{}
	_ [8]byte  = [unsafe.Offsetof(ioCmd{}.addr)]byte{}
	_ [24]byte = [unsafe.Sizeof(ioDesc{})]byte{}
	_ [4]byte  = [unsafe.Offsetof(ioDesc{}.nrSectors)]byte{}
	_ [8]byte  = [unsafe.Offsetof(ioDesc{}.startSector)]byte{}
)
