package auth

import (
	"encoding/binary"
	"fmt"
	"slices"
)

var le = binary.LittleEndian

// MaxMessage is the room that a host offers for a message, in bytes. The longest message, a
// Reply with SHA512 and FFDHE8192, has 1168.
const MaxMessage = 4096

// Kind is the type (high byte) and the id (low byte) of a message.
type Kind uint16

// Messages.
const (
	Negotiate Kind = 0x0000
	Challenge Kind = 0x0101
	Reply     Kind = 0x0102
	Success1  Kind = 0x0103
	Success2  Kind = 0x0104
	Failure2  Kind = 0x00F0
	Failure1  Kind = 0x00F1
)

func (k Kind) String() string {
	switch k {
	case Negotiate:
		return "Negotiate"
	case Challenge:
		return "Challenge"
	case Reply:
		return "Reply"
	case Success1:
		return "Success1"
	case Success2:
		return "Success2"
	case Failure2:
		return "Failure2"
	case Failure1:
		return "Failure1"
	}
	return fmt.Sprintf("message %02xh.%02xh", uint8(k>>8), uint8(k))
}

const (
	headerSize    = 16 // of Challenge, Reply and Success1, before the values
	failureSize   = 8
	negotiateSize = 72
	maxIDs        = 30 // hashes, and groups, in a Negotiate
	protocolCHAP  = 1
)

// message returns the first n bytes of a message, with its header.
func message(k Kind, tid uint16, n int) []byte {
	b := make([]byte, n)
	b[0], b[1] = uint8(k>>8), uint8(k)
	le.PutUint16(b[4:], tid)
	return b
}

// kindOf returns the kind and the transaction id of a message.
func kindOf(b []byte) (Kind, uint16, error) {
	if len(b) < failureSize {
		return 0, 0, fmt.Errorf("a message of %d bytes", len(b))
	}
	return Kind(b[0])<<8 | Kind(b[1]), le.Uint16(b[4:]), nil
}

// Begins reports whether a message from the host begins a run.
func Begins(message []byte) bool {
	k, _, err := kindOf(message)
	return err == nil && k == Negotiate
}

// offer is a Negotiate message.
//
//	6 SC_C   7 number of descriptors   8 AUTHID   10 HALEN   11 DHLEN   12 hash ids   42 group ids
type offer struct {
	channel  uint8
	protocol uint8
	hashes   []Hash
	groups   []Group
}

func (o offer) encode(tid uint16) []byte {
	b := message(Negotiate, tid, negotiateSize)
	b[6], b[7], b[8] = o.channel, 1, o.protocol
	b[10], b[11] = uint8(len(o.hashes)), uint8(len(o.groups))
	for i, h := range o.hashes {
		b[12+i] = uint8(h)
	}
	for i, g := range o.groups {
		b[12+maxIDs+i] = uint8(g)
	}
	return b
}

// decodeOffer decodes the first descriptor of a Negotiate.
func decodeOffer(b []byte) (o offer, err error) {
	if len(b) < negotiateSize {
		return o, fmt.Errorf("a Negotiate of %d bytes; want %d", len(b), negotiateSize)
	}
	if b[7] == 0 {
		return o, fmt.Errorf("a Negotiate without a protocol")
	}
	o.channel, o.protocol = b[6], b[8]
	if b[10] > maxIDs || b[11] > maxIDs {
		return o, fmt.Errorf("a Negotiate with %d hashes and %d groups; want at most %d", b[10], b[11], maxIDs)
	}
	for _, h := range b[12 : 12+b[10]] {
		o.hashes = append(o.hashes, Hash(h))
	}
	for _, g := range b[12+maxIDs : 12+maxIDs+b[11]] {
		o.groups = append(o.groups, Group(g))
	}
	return o, nil
}

// question is a Challenge message.
//
//	6 HL   8 hash id   9 group id   10 DHVLEN   12 S1   16 C1, public value
type question struct {
	hash      Hash
	group     Group
	sequence  uint32 // S1
	challenge []byte // C1
	public    []byte
}

func (q question) encode(tid uint16) []byte {
	b := message(Challenge, tid, headerSize)
	b[6], b[8], b[9] = uint8(len(q.challenge)), uint8(q.hash), uint8(q.group)
	le.PutUint16(b[10:], uint16(len(q.public)))
	le.PutUint32(b[12:], q.sequence)
	return slices.Concat(b, q.challenge, q.public)
}

// decodeQuestion decodes a Challenge. It does not check hash and group, but for the length
// that they give to the values.
func decodeQuestion(b []byte) (q question, err error) {
	if len(b) < headerSize {
		return q, fmt.Errorf("a Challenge of %d bytes; want at least %d", len(b), headerSize)
	}
	q.hash, q.group, q.sequence = Hash(b[8]), Group(b[9]), le.Uint32(b[12:])
	hl, public := int(b[6]), int(le.Uint16(b[10:]))
	if q.hash.Size() != 0 && hl != q.hash.Size() || q.group.known() && public != q.group.Size() {
		return q, fmt.Errorf("a Challenge with values of %d and %d bytes; %v has %d, and %v has %d", hl, public, q.hash, q.hash.Size(), q.group, q.group.Size())
	}
	if len(b) < headerSize+hl+public {
		return q, fmt.Errorf("a Challenge of %d bytes; want %d", len(b), headerSize+hl+public)
	}
	q.challenge, q.public = b[headerSize:][:hl], b[headerSize+hl:][:public]
	return q, nil
}

// answer is a Reply message.
//
//	6 HL   8 CVALID   10 DHVLEN   12 S2   16 R1, C2, public value
type answer struct {
	response  []byte // R1
	challenge []byte // C2, of the same length; zeroes if there is none
	asks      bool   // CVALID: the controller must prove that it has the controller key
	sequence  uint32 // S2
	public    []byte
}

func (a answer) encode(tid uint16) []byte {
	b := message(Reply, tid, headerSize)
	b[6] = uint8(len(a.response))
	if a.asks {
		b[8] = 1
	}
	le.PutUint16(b[10:], uint16(len(a.public)))
	le.PutUint32(b[12:], a.sequence)
	return slices.Concat(b, a.response, a.challenge, a.public)
}

// decodeAnswer decodes a Reply with values of these lengths.
func decodeAnswer(b []byte, hl, public int) (a answer, err error) {
	if want := headerSize + 2*hl + public; len(b) < want {
		return a, fmt.Errorf("a Reply of %d bytes; want %d", len(b), want)
	}
	if int(b[6]) != hl || int(le.Uint16(b[10:])) != public {
		return a, fmt.Errorf("a Reply with values of %d and %d bytes; want %d and %d", b[6], le.Uint16(b[10:]), hl, public)
	}
	a.asks, a.sequence = b[8]&1 != 0, le.Uint32(b[12:])
	a.response, a.challenge, a.public = b[headerSize:][:hl], b[headerSize+hl:][:hl], b[headerSize+2*hl:][:public]
	return a, nil
}

// proof is a Success1 message. The room for R2 is there also without one, and HL as well:
// Linux' host wants both.
//
//	6 HL   8 RVALID   16 R2
type proof struct {
	valid    bool   // RVALID
	response []byte // R2
}

func (p proof) encode(tid uint16) []byte {
	b := message(Success1, tid, headerSize)
	b[6] = uint8(len(p.response))
	if p.valid {
		b[8] = 1
	}
	return append(b, p.response...)
}

// decodeProof decodes a Success1 with a response of hl bytes.
func decodeProof(b []byte, hl int) (p proof, err error) {
	if len(b) < headerSize {
		return p, fmt.Errorf("a Success1 of %d bytes; want at least %d", len(b), headerSize)
	}
	if p.valid = b[8]&1 != 0; !p.valid {
		return p, nil
	}
	if int(b[6]) != hl || len(b) < headerSize+hl {
		return p, fmt.Errorf("a Success1 of %d bytes with a response of %d bytes; want one of %d", len(b), b[6], hl)
	}
	p.response = b[headerSize:][:hl]
	return p, nil
}

func encodeSuccess2(tid uint16) []byte { return message(Success2, tid, headerSize) }

// encodeFailure encodes a Failure1 or a Failure2.
func encodeFailure(k Kind, tid uint16, r Reason) []byte {
	b := message(k, tid, failureSize)
	b[6], b[7] = 1, uint8(r)
	return b
}

// decodeFailure returns the reason of a failure message of at least failureSize bytes.
func decodeFailure(b []byte) Reason { return Reason(b[7]) }
