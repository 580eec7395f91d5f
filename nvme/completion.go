package nvme

import "fmt"

// CompletionSize is the size of a completion queue entry in bytes.
const CompletionSize = 16

// Completion is a completion queue entry (Base, "Completion Queue Entry").
//
//	0 result   8 submission queue head   10 submission queue id
//	12 command id   14 phase (bit 0) and status
//
// On a fabric there is no phase bit and no submission queue id; both are 0.
type Completion [CompletionSize]byte

// CompletionAt returns the first 16 bytes of b as a completion, without a copy. It panics
// if b is shorter.
func CompletionAt(b []byte) *Completion {
	return (*Completion)(b[:CompletionSize:CompletionSize])
}

// Result returns bytes 0 to 7, the command specific result. Only Property Get and Zone
// Append use more than the low half.
func (c *Completion) Result() uint64 { return le.Uint64(c[0:8]) }

// SetResult sets bytes 0 to 7.
func (c *Completion) SetResult(v uint64) { le.PutUint64(c[0:8], v) }

// DW0 returns the low half of the result.
func (c *Completion) DW0() uint32 { return le.Uint32(c[0:4]) }

// SetDW0 sets the low half of the result.
func (c *Completion) SetDW0(v uint32) { le.PutUint32(c[0:4], v) }

// SQHead returns the submission queue head: the position up to which the controller has
// consumed the queue. In the completion of a Connect, 0xFFFF means that flow control is
// off. The field is then undefined in later completions.
func (c *Completion) SQHead() uint16 { return le.Uint16(c[8:10]) }

// SetSQHead sets the submission queue head.
func (c *Completion) SetSQHead(v uint16) { le.PutUint16(c[8:10], v) }

// SQID returns the submission queue id, reserved on fabrics.
func (c *Completion) SQID() uint16 { return le.Uint16(c[10:12]) }

// SetSQID sets the submission queue id.
func (c *Completion) SetSQID(v uint16) { le.PutUint16(c[10:12], v) }

// CID returns the id of the command that completed.
func (c *Completion) CID() uint16 { return le.Uint16(c[12:14]) }

// SetCID sets the command id.
func (c *Completion) SetCID(v uint16) { le.PutUint16(c[12:14], v) }

// Status returns the status without the phase bit.
func (c *Completion) Status() Status { return Status(le.Uint16(c[14:16]) >> 1) }

// SetStatus sets the status and clears the phase bit.
func (c *Completion) SetStatus(s Status) { le.PutUint16(c[14:16], uint16(s)<<1) }

// Set writes the whole completion as a controller sends it on a fabric.
func (c *Completion) Set(result uint64, sqHead, cid uint16, s Status) {
	le.PutUint64(c[0:8], result)
	le.PutUint64(c[8:16], uint64(sqHead)|uint64(cid)<<32|uint64(uint16(s)<<1)<<48)
}

// String returns a description of the completion for logs.
func (c *Completion) String() string {
	return fmt.Sprintf("cid %04xh result %#x sqhead %d: %v", c.CID(), c.Result(), c.SQHead(), c.Status().String())
}
