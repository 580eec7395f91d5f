package nvme

import (
	"bytes"
	"fmt"
	"strings"
)

// FCType is the Fabrics command type, byte 4 of a command with OpFabrics.
type FCType uint8

// Fabrics commands (Base, "Fabrics Command Set").
const (
	FabricsPropertySet FCType = 0x00
	FabricsConnect     FCType = 0x01
	FabricsPropertyGet FCType = 0x04
	FabricsAuthSend    FCType = 0x05
	FabricsAuthReceive FCType = 0x06
	FabricsDisconnect  FCType = 0x08
)

// String returns the name of the command.
func (t FCType) String() string {
	switch t {
	case FabricsPropertySet:
		return "property set"
	case FabricsConnect:
		return "connect"
	case FabricsPropertyGet:
		return "property get"
	case FabricsAuthSend:
		return "authentication send"
	case FabricsAuthReceive:
		return "authentication receive"
	case FabricsDisconnect:
		return "disconnect"
	}
	return fmt.Sprintf("fabrics command %02xh", uint8(t))
}

// Bits of the Connect attributes, byte 46 of the command
const (
	ConnectPriorityMask  = 0x03
	ConnectDisableSQFlow = 0x04
	// ConnectDeletesQueue means that the host may delete this I/O queue alone, with a
	// Disconnect.
	ConnectDeletesQueue = 0x08
)

// ConnectParams holds the fields of a Connect command.
type ConnectParams struct {
	// RecFmt is 0.
	RecFmt uint16
	// QID is 0 for the admin queue.
	QID uint16
	// SQSize is the number of submission queue entries, 0-based.
	SQSize uint16
	// Attributes holds the Connect bits.
	Attributes uint8
	// KATO is the keep alive timeout in milliseconds, on the admin queue. Zero
	// disables keep alive.
	KATO uint32
}

// SetConnect builds a Connect of queue qid with sqsize+1 entries (sqsize is
// 0-based). kato is the keep alive timeout in milliseconds, 0 for I/O queues.
// The data are a [ConnectData].
func (c *Command) SetConnect(qid, sqsize uint16, kato uint32, disableSQFlow bool) {
	var cattr uint64
	if disableSQFlow {
		cattr = ConnectDisableSQFlow
	}
	c.fill(OpFabrics, uint32(FabricsConnect), uint64(qid)<<16|uint64(sqsize)<<32|cattr<<48, uint64(kato), 0)
}

// ConnectParams returns the fields of a Connect command.
func (c *Command) ConnectParams() ConnectParams {
	return ConnectParams{
		RecFmt:     le.Uint16(c[40:42]),
		QID:        le.Uint16(c[42:44]),
		SQSize:     le.Uint16(c[44:46]),
		Attributes: c[46],
		KATO:       le.Uint32(c[48:52]),
	}
}

// SetPropertyGet builds a Property Get of the property at offset, 8 bytes wide
// if size8 and 4 otherwise. The value is the result of the completion.
func (c *Command) SetPropertyGet(offset uint32, size8 bool) {
	c.fill(OpFabrics, uint32(FabricsPropertyGet), propertyWord(offset, size8), 0, 0)
}

// SetPropertySet builds a Property Set of the property at offset, 8 bytes wide
// if size8 and 4 otherwise.
func (c *Command) SetPropertySet(offset uint32, value uint64, size8 bool) {
	c.fill(OpFabrics, uint32(FabricsPropertySet), propertyWord(offset, size8), value, 0)
}

func propertyWord(offset uint32, size8 bool) uint64 {
	w := uint64(offset) << 32
	if size8 {
		w |= 1
	}
	return w
}

// Property returns the property that a Property Get or Set names. ok is false if its size
// is neither 4 nor 8 bytes.
func (c *Command) Property() (offset uint32, size8, ok bool) {
	size := c[40] & 7
	return le.Uint32(c[44:48]), size == 1, size <= 1
}

// PropertyValue returns the value of a Property Set. For a 4 byte property, only the low
// half is valid.
func (c *Command) PropertyValue() uint64 { return le.Uint64(c[48:56]) }

// SetAuthSend builds an Authentication Send of length bytes of a DH-HMAC-CHAP
// message.
func (c *Command) SetAuthSend(length uint32) { c.fillAuth(FabricsAuthSend, length) }

// SetAuthReceive builds an Authentication Receive of at most length bytes of a
// DH-HMAC-CHAP message.
func (c *Command) SetAuthReceive(length uint32) { c.fillAuth(FabricsAuthReceive, length) }

func (c *Command) fillAuth(t FCType, length uint32) {
	// Security protocol E9h (NVMe), SPSP0 and SPSP1 01h: in-band authentication.
	c.fill(OpFabrics, uint32(t), 0xE9_01_01_00|uint64(length)<<32, 0, 0)
}

// AuthLength returns the transfer or allocation length of an Authentication Send or
// Receive. ok is false if the command names another security protocol.
func (c *Command) AuthLength() (length uint32, ok bool) {
	return le.Uint32(c[44:48]), c[41] == 1 && c[42] == 1 && c[43] == 0xE9
}

// SetDisconnect builds a Disconnect of the I/O queue that carries it.
func (c *Command) SetDisconnect() { c.fill(OpFabrics, uint32(FabricsDisconnect), 0, 0, 0) }

// ConnectDataSize is the size of the data of a Connect in bytes.
const ConnectDataSize = 1024

// CNTLIDDynamic in Connect data lets the controller choose its id. It is used on the
// admin queue. On I/O queues the host names the id that the controller chose.
const CNTLIDDynamic = 0xFFFF

// CNTLIDMax is the largest id that a controller may have.
const CNTLIDMax = 0xFFEF

// ConnectData is the data of a Connect (Base, "Connect Command - Data").
//
//	0 host id   16 controller id   256 subsystem nqn   512 host nqn
type ConnectData [ConnectDataSize]byte

// ConnectDataAt returns the first 1024 bytes of b as Connect data, without a copy. It
// panics if b is shorter.
func ConnectDataAt(b []byte) *ConnectData {
	return (*ConnectData)(b[:ConnectDataSize:ConnectDataSize])
}

// HostID returns the host identifier.
func (d *ConnectData) HostID() UUID { return UUID(d[0:16]) }

// SetHostID sets the host identifier.
func (d *ConnectData) SetHostID(id UUID) { copy(d[0:16], id[:]) }

// CNTLID returns the controller id.
func (d *ConnectData) CNTLID() uint16 { return le.Uint16(d[16:18]) }

// SetCNTLID sets the controller id, CNTLIDDynamic on the admin queue.
func (d *ConnectData) SetCNTLID(id uint16) { le.PutUint16(d[16:18], id) }

// SubNQN returns the subsystem's NQN, not validated.
func (d *ConnectData) SubNQN() string { return cString(d[256:512]) }

// SetSubNQN sets the subsystem's NQN. The error is that of [ValidateNQN].
func (d *ConnectData) SetSubNQN(nqn string) error { return putNQN(d[256:512], nqn) }

// HostNQN returns the host's NQN, not validated.
func (d *ConnectData) HostNQN() string { return cString(d[512:768]) }

// SetHostNQN sets the host's NQN. The error is that of [ValidateNQN].
func (d *ConnectData) SetHostNQN(nqn string) error { return putNQN(d[512:768], nqn) }

// cString returns the bytes up to the first NUL.
func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// text returns an ASCII field that is padded with spaces, without the padding. Some
// controllers pad with NULs.
func text(b []byte) string { return strings.TrimRight(cString(b), " ") }

// putText fills b with s and spaces. It returns an error if s is too long.
func putText(b []byte, s string) error {
	if len(s) > len(b) {
		return fmt.Errorf("set text field: %d bytes exceed %d", len(s), len(b))
	}
	n := copy(b, s)
	for i := range b[n:] {
		b[n+i] = ' '
	}
	return nil
}

// ConnectResult is dword 0 of the completion of a successful Connect.
type ConnectResult uint32

// CNTLID returns the id of the controller.
func (r ConnectResult) CNTLID() uint16 { return uint16(r) }

// AuthRequired reports whether the host must authenticate in-band before it may use the
// queue (ATR).
func (r ConnectResult) AuthRequired() bool { return r&(1<<17) != 0 }

// SecureChannelRequired reports whether authentication must set up a secure channel
// (ASCR), which is not possible on RDMA.
func (r ConnectResult) SecureChannelRequired() bool { return r&(1<<18) != 0 }

// NewConnectResult builds the result of a successful Connect.
func NewConnectResult(cntlid uint16, authRequired bool) ConnectResult {
	r := ConnectResult(cntlid)
	if authRequired {
		r |= 1 << 17
	}
	return r
}

// ConnectInvalidParam is dword 0 of the completion of a Connect that failed with
// StatusConnectInvalidParam. It names the refused field.
type ConnectInvalidParam uint32

// NewConnectInvalidParam returns the value that names the field at byte offset of the
// command, or of the Connect data if inData.
func NewConnectInvalidParam(offset uint16, inData bool) ConnectInvalidParam {
	p := ConnectInvalidParam(offset)
	if inData {
		p |= 1 << 16
	}
	return p
}

// Offset returns the byte offset of the field.
func (p ConnectInvalidParam) Offset() uint16 { return uint16(p) }

// InData reports whether the offset is in the Connect data and not in the command.
func (p ConnectInvalidParam) InData() bool { return p>>16&0xFF == 1 }

// String returns the name of the field.
func (p ConnectInvalidParam) String() string {
	if p.InData() {
		switch o := p.Offset(); {
		case o < 16:
			return "host identifier"
		case o == 16:
			return "controller id"
		case o >= 256 && o < 512:
			return "subsystem nqn"
		case o >= 512 && o < 768:
			return "host nqn"
		default:
			return fmt.Sprintf("connect data byte %d", o)
		}
	}
	switch o := p.Offset(); o {
	case 40:
		return "record format"
	case 42:
		return "queue id"
	case 44:
		return "submission queue size"
	case 46:
		return "connect attributes"
	case 48:
		return "keep alive timeout"
	default:
		return fmt.Sprintf("connect command byte %d", o)
	}
}

// Property offsets (Base, "Controller Properties"). CAP is 8 bytes, the others
// are 4.
const (
	PropCAP  = 0x00
	PropVS   = 0x08
	PropCC   = 0x14
	PropCSTS = 0x1C
	PropNSSR = 0x20
	PropCRTO = 0x68
)

// NSSRReset is the value that resets the NVM subsystem when it is written to
// PropNSSR: "NVMe" in ASCII.
const NSSRReset = 0x4E564D65

// Version is the VS property and the VER field of Identify Controller.
type Version uint32

// NewVersion composes a version.
func NewVersion(major uint16, minor, tertiary uint8) Version {
	return Version(major)<<16 | Version(minor)<<8 | Version(tertiary)
}

// Major returns the major version.
func (v Version) Major() uint16 { return uint16(v >> 16) }

// Minor returns the minor version.
func (v Version) Minor() uint8 { return uint8(v >> 8) }

// Tertiary returns the tertiary version.
func (v Version) Tertiary() uint8 { return uint8(v) }

// String returns "2.1", or "2.1.3" if there is a tertiary version.
func (v Version) String() string {
	if v.Tertiary() == 0 {
		return fmt.Sprintf("%d.%d", v.Major(), v.Minor())
	}
	return fmt.Sprintf("%d.%d.%d", v.Major(), v.Minor(), v.Tertiary())
}

// Cap is the CAP property.
type Cap uint64

// Command set bits of [Cap.CSS]
const (
	CSSNVM      = 1 << 0
	CSSIOSets   = 1 << 6 // Identify CNS 1Ch lists the I/O command sets
	CSSNoIOSets = 1 << 7
)

// MQES returns the largest queue size, 0-based.
func (c Cap) MQES() uint16 { return uint16(c) }

// CQR reports whether queues must be contiguous; always set on fabrics.
func (c Cap) CQR() bool { return c&(1<<16) != 0 }

// TO returns the time that a controller may take to become ready, in units of 500 ms.
func (c Cap) TO() uint8 { return uint8(c >> 24) }

// DSTRD returns the doorbell stride, reserved on fabrics.
func (c Cap) DSTRD() uint8 { return uint8(c>>32) & 15 }

// NSSRS reports whether the NVM subsystem can be reset.
func (c Cap) NSSRS() bool { return c&(1<<36) != 0 }

// CSS returns the supported command sets, CSS bits.
func (c Cap) CSS() uint8 { return uint8(c >> 37) }

// MPSMIN returns n for the smallest memory page of 2^(12+n) bytes, which is the unit of
// MDTS.
func (c Cap) MPSMIN() uint8 { return uint8(c>>48) & 15 }

// MPSMAX returns n for the largest memory page of 2^(12+n) bytes.
func (c Cap) MPSMAX() uint8 { return uint8(c>>52) & 15 }

// CRMS returns the ready modes. Bit 0 is "ready with media", and bit 1 is "ready
// independent of media". With bit 0, the CRTO property holds the timeouts.
func (c Cap) CRMS() uint8 { return uint8(c>>59) & 3 }

// CRWMS reports whether the controller supports "ready with media", and therefore the
// CRTO property.
func (c Cap) CRWMS() bool { return c&(1<<59) != 0 }

// CRIMS reports whether the controller supports "ready independent of media".
func (c Cap) CRIMS() bool { return c&(1<<60) != 0 }

// NewCap builds the CAP property of a controller with queues up to mqes+1
// entries (mqes is 0-based), a ready timeout of to x 500 ms and the command
// sets css. Pages are 4 KiB.
func NewCap(mqes uint16, to, css uint8) Cap {
	return Cap(mqes) | 1<<16 | Cap(to)<<24 | Cap(css)<<37
}

// CRTO is the CRTO property, which holds ready timeouts in units of 500 ms.
type CRTO uint32

// CRWMT returns the timeout of "ready with media".
func (c CRTO) CRWMT() uint16 { return uint16(c) }

// CRIMT returns the timeout of "ready independent of media".
func (c CRTO) CRIMT() uint16 { return uint16(c >> 16) }

// CC is the controller configuration property.
type CC uint32

// Shutdown notification in CC.
const (
	ShutdownNone   = 0
	ShutdownNormal = 1
	ShutdownAbrupt = 2
)

// Command set selection in CC.
const (
	CCSelectNVM  = 0 // NVM command set only
	CCSelectAll  = 6 // all I/O command sets; needs CSSIOSets
	CCSelectNone = 7 // no I/O command set
)

// NewCC returns a configuration for 64 byte commands, 16 byte completions,
// 4 KiB pages and round robin arbitration, not enabled. css is one of the
// CCSelect constants.
func NewCC(css uint8) CC { return 6<<16 | 4<<20 | CC(css&7)<<4 }

// EN reports whether the controller is enabled.
func (c CC) EN() bool { return c&1 != 0 }

// CSS returns the selected command sets.
func (c CC) CSS() uint8 { return uint8(c>>4) & 7 }

// MPS returns n for a memory page size of 2^(12+n) bytes.
func (c CC) MPS() uint8 { return uint8(c>>7) & 15 }

// AMS returns the arbitration mechanism, 0 for round robin.
func (c CC) AMS() uint8 { return uint8(c>>11) & 7 }

// SHN returns the shutdown notification.
func (c CC) SHN() uint8 { return uint8(c>>14) & 3 }

// IOSQES returns n for an I/O submission queue entry size of 2^n bytes.
func (c CC) IOSQES() uint8 { return uint8(c>>16) & 15 }

// IOCQES returns n for an I/O completion queue entry size of 2^n bytes.
func (c CC) IOCQES() uint8 { return uint8(c>>20) & 15 }

// CRIME reports whether "ready independent of media" is selected.
func (c CC) CRIME() bool { return c&(1<<24) != 0 }

// WithEN returns c with the controller enabled or disabled.
func (c CC) WithEN(on bool) CC {
	if on {
		return c | 1
	}
	return c &^ 1
}

// WithSHN returns c with a shutdown notification. It does not change EN, as the
// specification requires.
func (c CC) WithSHN(shn uint8) CC { return c&^(3<<14) | CC(shn&3)<<14 }

// CSTS is the controller status property.
type CSTS uint32

// Shutdown status in CSTS.
const (
	ShutdownStatusNormal   = 0
	ShutdownStatusRunning  = 1
	ShutdownStatusComplete = 2
)

// CSTSGone is the value that is read if the controller is not there.
const CSTSGone CSTS = 0xFFFFFFFF

// RDY reports whether the controller is ready for commands.
func (c CSTS) RDY() bool { return c&1 != 0 }

// CFS reports whether there is a fatal controller error.
func (c CSTS) CFS() bool { return c&2 != 0 }

// SHST returns the shutdown status.
func (c CSTS) SHST() uint8 { return uint8(c>>2) & 3 }

// NSSRO reports whether the NVM subsystem has been reset.
func (c CSTS) NSSRO() bool { return c&(1<<4) != 0 }

// PP reports whether command processing is paused by a firmware activation.
func (c CSTS) PP() bool { return c&(1<<5) != 0 }

// NewCSTS composes a controller status.
func NewCSTS(rdy, cfs bool, shst uint8) CSTS {
	c := CSTS(shst&3) << 2
	if rdy {
		c |= 1
	}
	if cfs {
		c |= 2
	}
	return c
}

// String returns the status in words.
func (c CSTS) String() string {
	if c == CSTSGone {
		return "gone"
	}
	out := "not ready"
	if c.RDY() {
		out = "ready"
	}
	if c.CFS() {
		out += ", fatal error"
	}
	switch c.SHST() {
	case ShutdownStatusRunning:
		out += ", shutting down"
	case ShutdownStatusComplete:
		out += ", shut down"
	}
	if c.NSSRO() {
		out += ", subsystem was reset"
	}
	if c.PP() {
		out += ", processing paused"
	}
	return out
}
