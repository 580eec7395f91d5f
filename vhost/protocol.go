package vhost

import (
	"encoding/binary"
	"fmt"
)

// Numbers and structures of the vhost-user protocol (QEMU, docs/interop/vhost-user.rst) and
// of virtio (OASIS virtio 1.2). All of them are little-endian here: see New.

// request is the number of a message of the front end.
type request uint32

const (
	getFeatures         request = 1
	setFeatures         request = 2
	setOwner            request = 3
	resetOwner          request = 4
	setMemTable         request = 5
	setLogBase          request = 6
	setLogFD            request = 7
	setVringNum         request = 8
	setVringAddr        request = 9
	setVringBase        request = 10
	getVringBase        request = 11
	setVringKick        request = 12
	setVringCall        request = 13
	setVringErr         request = 14
	getProtocolFeatures request = 15
	setProtocolFeatures request = 16
	getQueueNum         request = 17
	setVringEnable      request = 18
	setBackendReqFD     request = 21
	getConfig           request = 24
	setConfig           request = 25
	getInflightFD       request = 31
	setInflightFD       request = 32
	resetDevice         request = 34
	getMaxMemSlots      request = 36
	addMemReg           request = 37
	remMemReg           request = 38
)

var requestNames = map[request]string{
	getFeatures: "GET_FEATURES", setFeatures: "SET_FEATURES", setOwner: "SET_OWNER", resetOwner: "RESET_OWNER",
	setMemTable: "SET_MEM_TABLE", setLogBase: "SET_LOG_BASE", setLogFD: "SET_LOG_FD",
	setVringNum: "SET_VRING_NUM", setVringAddr: "SET_VRING_ADDR", setVringBase: "SET_VRING_BASE", getVringBase: "GET_VRING_BASE",
	setVringKick: "SET_VRING_KICK", setVringCall: "SET_VRING_CALL", setVringErr: "SET_VRING_ERR",
	getProtocolFeatures: "GET_PROTOCOL_FEATURES", setProtocolFeatures: "SET_PROTOCOL_FEATURES",
	getQueueNum: "GET_QUEUE_NUM", setVringEnable: "SET_VRING_ENABLE", setBackendReqFD: "SET_BACKEND_REQ_FD",
	getConfig: "GET_CONFIG", setConfig: "SET_CONFIG", getInflightFD: "GET_INFLIGHT_FD", setInflightFD: "SET_INFLIGHT_FD",
	resetDevice: "RESET_DEVICE", getMaxMemSlots: "GET_MAX_MEM_SLOTS", addMemReg: "ADD_MEM_REG", remMemReg: "REM_MEM_REG",
}

func (r request) String() string {
	if name, ok := requestNames[r]; ok {
		return name
	}
	return fmt.Sprintf("message %d", uint32(r))
}

// backendConfigChange is the number of the message CONFIG_CHANGE_MSG on the back-end
// channel.
const backendConfigChange = 2

const (
	headerSize = 12
	// maxPayload is more than the largest payload, which is that of GET_CONFIG.
	maxPayload = 512
	// maxFDs is the largest number of file descriptors of a message.
	maxFDs = 8

	flagVersion     = 1
	flagVersionMask = 3
	flagReply       = 1 << 2
	flagNeedReply   = 1 << 3
)

// Protocol features
const (
	protoMQ                = 1 << 0
	protoLogShmFD          = 1 << 1
	protoReplyAck          = 1 << 3
	protoBackendReq        = 1 << 5
	protoConfig            = 1 << 9
	protoInflightShmFD     = 1 << 12
	protoResetDevice       = 1 << 13
	protoConfigureMemSlots = 1 << 15

	protocolFeatures = protoMQ | protoLogShmFD | protoReplyAck | protoBackendReq | protoConfig |
		protoInflightShmFD | protoResetDevice | protoConfigureMemSlots
)

// Features of the device, of the ring and of vhost
const (
	featSegMax           = 1 << 2
	featReadOnly         = 1 << 5
	featBlkSize          = 1 << 6
	featFlush            = 1 << 9
	featTopology         = 1 << 10
	featMQ               = 1 << 12
	featDiscard          = 1 << 13
	featWriteZeroes      = 1 << 14
	featLogAll           = 1 << 26
	featIndirect         = 1 << 28
	featEventIdx         = 1 << 29
	featProtocolFeatures = 1 << 30
	featVersion1         = 1 << 32

	// alwaysOffered are the features that do not depend on the device.
	alwaysOffered = featSegMax | featBlkSize | featFlush | featTopology | featMQ | featLogAll |
		featIndirect | featEventIdx | featProtocolFeatures | featVersion1
	// everOffered are the features that a guest may have negotiated with an earlier
	// server of the same disk.
	everOffered = alwaysOffered | featReadOnly | featDiscard | featWriteZeroes
)

// Limits that a front end may remember over a reconnection, so they do not change.
const (
	// maxRings is the largest number of queues of a device.
	maxRings = 256
	// maxSlots is the largest number of memory regions.
	maxSlots = 512
	// maxRingSize is the largest number of entries of a ring in virtio.
	maxRingSize = 32768
	// segMax is the largest number of data segments of a request. With header and
	// status it fits into a ring of 128 entries, QEMU's default.
	segMax = 126
	// maxDiscardSegments is the largest number of ranges of a discard or write zeroes.
	maxDiscardSegments = 32
	// maxSegments is the largest number of descriptors of a chain that is accepted. A
	// driver may divide header and status as it likes.
	maxSegments = 256
)

// message is a message of the front end.
type message struct {
	request request
	flags   uint32
	payload []byte
	fds     []int // owned by the message, until a field is set to -1
	handed  bool  // an earlier server has handed it over, and has answered it
}

func (m *message) needsReply() bool { return m.flags&flagNeedReply != 0 }

// encode returns the message with its header.
func (m *message) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(make([]byte, 0, headerSize+len(m.payload)), uint32(m.request))
	b = le.AppendUint32(b, m.flags)
	b = le.AppendUint32(b, uint32(len(m.payload)))
	return append(b, m.payload...)
}

// u64 returns the payload of a message that is one number.
func (m *message) u64() (uint64, error) {
	if len(m.payload) != 8 {
		return 0, fmt.Errorf("payload of %d bytes, want 8", len(m.payload))
	}
	return binary.LittleEndian.Uint64(m.payload), nil
}

// vringState is the payload of SET_VRING_NUM and others.
func (m *message) vringState() (index, num uint32, err error) {
	if len(m.payload) != 8 {
		return 0, 0, fmt.Errorf("payload of %d bytes, want 8", len(m.payload))
	}
	le := binary.LittleEndian
	return le.Uint32(m.payload), le.Uint32(m.payload[4:]), nil
}

// takeFD returns the only descriptor of a message. It belongs to the caller then.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%d file descriptors, want 1", len(m.fds))
	}
	fd := m.fds[0]
	m.fds[0] = -1
	return fd, nil
}

// vringAddr is the payload of SET_VRING_ADDR. desc, used and avail are addresses in the
// front end's address space. log is the guest address of the used ring.
type vringAddr struct {
	flags                  uint32
	desc, used, avail, log uint64
}

const vringLog = 1 << 0 // vringAddr.flags: log writes to the used ring

func decodeVringAddr(p []byte) (index uint32, a vringAddr, err error) {
	if len(p) != 40 {
		return 0, a, fmt.Errorf("payload of %d bytes, want 40", len(p))
	}
	le := binary.LittleEndian
	return le.Uint32(p), vringAddr{
		flags: le.Uint32(p[4:]), desc: le.Uint64(p[8:]), used: le.Uint64(p[16:]), avail: le.Uint64(p[24:]), log: le.Uint64(p[32:]),
	}, nil
}

// encode is the opposite of decodeVringAddr.
func (a vringAddr) encode(index uint32) []byte {
	return words(halves(index, a.flags), a.desc, a.used, a.avail, a.log)
}

// area is a memory region as the front end describes it.
type area struct {
	guest, size, user, offset uint64
}

const areaSize = 32

func decodeArea(p []byte) area {
	le := binary.LittleEndian
	return area{guest: le.Uint64(p), size: le.Uint64(p[8:]), user: le.Uint64(p[16:]), offset: le.Uint64(p[24:])}
}

// encode is the opposite of decodeArea.
func (a area) encode() []byte { return words(a.guest, a.size, a.user, a.offset) }

// words returns numbers as a payload has them.
func words(all ...uint64) []byte {
	b := make([]byte, 0, 8*len(all))
	for _, v := range all {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// halves returns two numbers of 32 bits as a payload has them.
func halves(first, second uint32) uint64 { return uint64(first) | uint64(second)<<32 }

// inflightDesc is the payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
type inflightDesc struct {
	size, offset     uint64
	queues, ringSize uint16
}

const inflightDescSize = 20

// decodeInflight accepts the padding that QEMU and others send after the fields.
func decodeInflight(p []byte) (d inflightDesc, err error) {
	if len(p) < inflightDescSize || len(p) > inflightDescSize+4 {
		return d, fmt.Errorf("payload of %d bytes, want %d", len(p), inflightDescSize)
	}
	le := binary.LittleEndian
	return inflightDesc{le.Uint64(p), le.Uint64(p[8:]), le.Uint16(p[16:]), le.Uint16(p[18:])}, nil
}

// encode stores the fields in the payload of a request. QEMU wants its padding back.
func (d inflightDesc) encode(p []byte) {
	le := binary.LittleEndian
	le.PutUint64(p, d.size)
	le.PutUint64(p[8:], d.offset)
	le.PutUint16(p[16:], d.queues)
	le.PutUint16(p[18:], d.ringSize)
}

// Structures of the split ring, virtio 1.2 section 2.7
const (
	descSize  = 16
	usedSize  = 8 // of an element
	descNext  = 1
	descWrite = 2
	// descIndirect means that the buffer is a table of descriptors.
	descIndirect = 4

	usedNoNotify     = 1 // used.flags: no kick, please
	availNoInterrupt = 1 // avail.flags: no call, please
)

// Requests, virtio 1.2 section 5.2.6
const (
	blkIn          = 0
	blkOut         = 1
	blkFlush       = 4
	blkGetID       = 8
	blkDiscard     = 11
	blkWriteZeroes = 13

	statusOK          = 0
	statusIOErr       = 1
	statusUnsupported = 2

	blkHeaderSize = 16
	rangeSize     = 16 // struct virtio_blk_discard_write_zeroes
	unmapFlag     = 1
	idSize        = 20

	configSize    = 60  // struct virtio_blk_config up to the fields for zones
	maxConfigSize = 256 // VHOST_USER_MAX_CONFIG_SIZE
	configHeader  = 12  // offset, size, flags
)
