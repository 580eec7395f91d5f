package nvme

import (
	"crypto/rand"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// DiscoveryNQN is the well-known name of discovery subsystems.
	DiscoveryNQN = "nqn.2014-08.org.nvmexpress.discovery"
	// NQNUUIDPrefix is the prefix of names that are made from a UUID.
	NQNUUIDPrefix = "nqn.2014-08.org.nvmexpress:uuid:"
	// MaxNQNLength is the longest NQN in bytes, without the terminating NUL.
	MaxNQNLength = 223

	nqnFieldSize = 256
)

// ErrInvalidNQN is wrapped by every error of [ValidateNQN].
var ErrInvalidNQN = errors.New("invalid nqn")

// ValidateNQN checks that s may be sent as a qualified name (Base, "NVMe Qualified
// Names"): 1 to 223 bytes of UTF-8 without NUL. It does not require the form
// "nqn.yyyy-mm.domain", because the kernel and targets accept other names, and such names
// are in use. See [WellFormedNQN].
func ValidateNQN(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: empty", ErrInvalidNQN)
	case len(s) > MaxNQNLength:
		return fmt.Errorf("%w: %d bytes exceed %d", ErrInvalidNQN, len(s), MaxNQNLength)
	case strings.IndexByte(s, 0) >= 0:
		return fmt.Errorf("%w: contains a NUL", ErrInvalidNQN)
	case !utf8.ValidString(s):
		return fmt.Errorf("%w: not UTF-8", ErrInvalidNQN)
	}
	return nil
}

// WellFormedNQN reports whether s is valid and has the form
// "nqn.yyyy-mm.reverse.domain", optionally with ":" and an owner's string.
func WellFormedNQN(s string) bool {
	const form = "nqn.dddd-dd."
	if ValidateNQN(s) != nil || len(s) <= len(form) {
		return false
	}
	for i := range len(form) {
		if form[i] == 'd' {
			if s[i] < '0' || s[i] > '9' {
				return false
			}
		} else if s[i] != form[i] {
			return false
		}
	}
	return s[len(form)] != ':'
}

// UUIDNQN returns the NQN made from a UUID.
func UUIDNQN(id UUID) string { return NQNUUIDPrefix + id.String() }

// putNQN writes an NQN and zeroes into a 256 byte field.
func putNQN(b []byte, nqn string) error {
	if err := ValidateNQN(nqn); err != nil {
		return err
	}
	n := copy(b[:nqnFieldSize], nqn)
	clear(b[n:nqnFieldSize])
	return nil
}

// UUID is a UUID in the order of its text form, which is also its order in host
// identifiers and namespace descriptors.
type UUID [16]byte

// NewUUID returns a random (version 4) UUID.
func NewUUID() UUID {
	var u UUID
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0F | 0x40
	u[8] = u[8]&0x3F | 0x80
	return u
}

// NameUUID returns the UUID (version 5, RFC 9562, 5.5) of a name in a name space. It is
// always the same for the same arguments.
func NameUUID(space UUID, name string) UUID {
	h := sha1.New()
	h.Write(space[:]) // never fails
	h.Write([]byte(name))
	u := UUID(h.Sum(nil)[:16])
	u[6] = u[6]&0x0F | 0x50
	u[8] = u[8]&0x3F | 0x80
	return u
}

// ParseUUID reads the 36 character form, in either case.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return UUID{}, fmt.Errorf("parse uuid %q: not of the form 8-4-4-4-12", s)
	}
	digits := s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36]
	if _, err := hex.Decode(u[:], []byte(digits)); err != nil {
		return UUID{}, fmt.Errorf("parse uuid %q: not hexadecimal", s)
	}
	return u, nil
}

// IsZero reports whether every byte is 0, which means that there is no UUID.
func (u UUID) IsZero() bool { return u == UUID{} }

// String returns the 36 character form in lower case.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// MarshalText returns the form of String.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText accepts the same forms as [ParseUUID].
func (u *UUID) UnmarshalText(b []byte) error {
	v, err := ParseUUID(string(b))
	if err != nil {
		return err
	}
	*u = v
	return nil
}
