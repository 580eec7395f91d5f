package nbd

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Numbers of doc/proto.md. All integers on the wire are big-endian.
const (
	magicHello       uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      uint64 = 0x49484156454F5054 // "IHAVEOPT"
	magicOptionReply uint64 = 0x3e889045565a9
	magicRequest     uint32 = 0x25609513
	magicSimple      uint32 = 0x67446698
	magicStructured  uint32 = 0x668e33ef
)

// Handshake flags, of the server and of the client alike.
const (
	handshakeFixed    = 1 << 0
	handshakeNoZeroes = 1 << 1
	handshakeKnown    = handshakeFixed | handshakeNoZeroes
)

// option is NBD_OPT_*.
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
)

// optionReply is NBD_REP_*.
type optionReply uint32

const (
	repAck    optionReply = 1
	repServer optionReply = 2
	repInfo   optionReply = 3

	repError      optionReply = 1 << 31
	repErrUnsup               = repError + 1
	repErrPolicy              = repError + 2
	repErrInvalid             = repError + 3
	repErrTLSReqd             = repError + 5
	repErrUnknown             = repError + 6
	repErrTooBig              = repError + 9
)

// infoType is NBD_INFO_*.
type infoType uint16

const (
	infoExport      infoType = 0
	infoName        infoType = 1
	infoDescription infoType = 2
	infoBlockSize   infoType = 3
)

// Transmission flags, NBD_FLAG_*.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendFlush    = 1 << 2
	flagSendFUA      = 1 << 3
	flagSendTrim     = 1 << 5
	flagSendZeroes   = 1 << 6
	flagSendDF       = 1 << 7
	flagCanMultiConn = 1 << 8
)

// command is NBD_CMD_*.
type command uint16

const (
	cmdRead   command = 0
	cmdWrite  command = 1
	cmdDisc   command = 2
	cmdFlush  command = 3
	cmdTrim   command = 4
	cmdZeroes command = 6
)

// Command flags, NBD_CMD_FLAG_*.
const (
	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2
)

// code is an error number on the wire. The numbers are those of Linux on every machine.
type code uint32

const (
	codePerm     code = 1
	codeIO       code = 5
	codeNoMem    code = 12
	codeInval    code = 22
	codeNoSpace  code = 28
	codeOverflow code = 75
	codeNotSupp  code = 95
	codeShutdown code = 108
)

// codeOf returns the code for a back end's errno.
func codeOf(errno uint16) code {
	switch unix.Errno(errno) {
	case 0:
		return 0
	case unix.EPERM, unix.EACCES, unix.EROFS:
		return codePerm
	case unix.ENOMEM:
		return codeNoMem
	case unix.EINVAL:
		return codeInval
	case unix.ENOSPC:
		return codeNoSpace
	case unix.EOPNOTSUPP:
		return codeNotSupp
	case unix.ESHUTDOWN:
		return codeShutdown
	}
	return codeIO
}

// Flag and types of the chunks of structured replies
const (
	chunkDone       = 1 << 0
	chunkOffsetData = 1
	chunkError      = 1<<15 + 1
)

const (
	requestSize    = 28
	simpleSize     = 16
	structuredSize = 20
	dataHeader     = structuredSize + 8 // with the offset of the data
	errorChunk     = structuredSize + 6 // with the error and an empty message
)

// request is the header of a request.
type request struct {
	magic  uint32
	flags  uint16
	kind   command
	cookie uint64
	offset uint64
	length uint32
}

// decodeRequest decodes the first requestSize bytes of b.
func decodeRequest(b []byte) request {
	be := binary.BigEndian
	_ = b[requestSize-1]
	return request{
		magic: be.Uint32(b), flags: be.Uint16(b[4:]), kind: command(be.Uint16(b[6:])),
		cookie: be.Uint64(b[8:]), offset: be.Uint64(b[16:]), length: be.Uint32(b[24:]),
	}
}

func putSimple(b []byte, cookie uint64, c code) []byte {
	be := binary.BigEndian
	be.PutUint32(b, magicSimple)
	be.PutUint32(b[4:], uint32(c))
	be.PutUint64(b[8:], cookie)
	return b[:simpleSize]
}

// putData writes the header of a chunk with data of a read.
func putData(b []byte, cookie, offset uint64, length uint32, last bool) []byte {
	flags := uint16(0)
	if last {
		flags = chunkDone
	}
	putChunk(b, flags, chunkOffsetData, cookie, 8+length)
	binary.BigEndian.PutUint64(b[structuredSize:], offset)
	return b[:dataHeader]
}

func putError(b []byte, cookie uint64, c code) []byte {
	putChunk(b, chunkDone, chunkError, cookie, errorChunk-structuredSize)
	binary.BigEndian.PutUint32(b[structuredSize:], uint32(c))
	binary.BigEndian.PutUint16(b[structuredSize+4:], 0)
	return b[:errorChunk]
}

func putChunk(b []byte, flags, kind uint16, cookie uint64, length uint32) {
	be := binary.BigEndian
	be.PutUint32(b, magicStructured)
	be.PutUint16(b[4:], flags)
	be.PutUint16(b[6:], kind)
	be.PutUint64(b[8:], cookie)
	be.PutUint32(b[16:], length)
}
