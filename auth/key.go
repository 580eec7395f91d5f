package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"slices"
	"strings"
)

const (
	keyPrefix = "DHHC-1:"
	// transformSuffix follows the NQN in the transformation of a secret.
	transformSuffix = "NVMe-over-Fabrics"
)

// Key is a secret of 32, 48 or 64 bytes, and the hash that binds it to a name. fmt and slog
// print only the length of the secret.
type Key struct {
	transform Hash
	secret    []byte
}

// NewKey makes a key of a secret of 32, 48 or 64 bytes. transform may be NoHash.
func NewKey(transform Hash, secret []byte) (*Key, error) {
	if transform > SHA512 {
		return nil, fmt.Errorf("key: transformation %02d; want 00, 01, 02 or 03", uint8(transform))
	}
	switch len(secret) {
	case 32, 48, 64:
		return &Key{transform, slices.Clone(secret)}, nil
	}
	return nil, fmt.Errorf("key: secret of %d bytes; want 32, 48 or 64", len(secret))
}

// GenerateKey makes a key of a random secret of 32, 48 or 64 bytes.
func GenerateKey(transform Hash, size int) (*Key, error) {
	secret := make([]byte, min(max(size, 0), 65))
	rand.Read(secret) // never fails
	return NewKey(transform, secret)
}

// KeyForm is the text form of a key, for errors.
const KeyForm = "DHHC-1:hh:BASE64: with hh 00 to 03"

// ParseKey reads a key from its text form, DHHC-1:hh:BASE64:, where hh is the transformation
// and BASE64 has the secret and its CRC-32. Errors do not contain the text.
func ParseKey(text string) (*Key, error) {
	rest, ok := strings.CutPrefix(text, keyPrefix)
	if !ok {
		return nil, errors.New("key: the prefix " + keyPrefix + " is missing")
	}
	number, encoded, ok := strings.Cut(rest, ":")
	encoded, closed := strings.CutSuffix(encoded, ":")
	switch {
	case !ok || !closed || strings.Contains(encoded, ":"):
		return nil, errors.New("key: want " + KeyForm)
	case len(number) != 2 || number[0] != '0' || number[1] < '0' || number[1] > '3':
		return nil, errors.New("key: the transformation after " + keyPrefix + " is not 00, 01, 02 or 03")
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || strings.ContainsAny(encoded, "\r\n") { // which the decoder ignores
		return nil, errors.New("key: the secret is not base64")
	}
	if len(raw) < crc32.Size {
		return nil, errors.New("key: the secret is missing")
	}
	secret, sum := raw[:len(raw)-crc32.Size], raw[len(raw)-crc32.Size:]
	k, err := NewKey(Hash(number[1]-'0'), secret)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(k.sum(), sum) == 0 {
		return nil, errors.New("key: the checksum does not match the secret, so a character is wrong")
	}
	return k, nil
}

func (k *Key) sum() []byte {
	return binary.LittleEndian.AppendUint32(nil, k.Checksum())
}

// Checksum returns the CRC-32 of the secret.
func (k *Key) Checksum() uint32 { return crc32.ChecksumIEEE(k.secret) }

// Text returns the text form, which contains the secret.
func (k *Key) Text() string {
	return fmt.Sprintf("%s%02d:%s:", keyPrefix, uint8(k.transform), base64.StdEncoding.EncodeToString(slices.Concat(k.secret, k.sum())))
}

// Transform returns the hash that binds the secret to a name, or NoHash.
func (k *Key) Transform() Hash { return k.transform }

// Size returns the length of the secret in bytes.
func (k *Key) Size() int { return len(k.secret) }

// Equal reports whether both keys are the same. It takes the same time for any secrets of
// one length.
func (k *Key) Equal(other *Key) bool {
	return k.transform == other.transform && subtle.ConstantTimeCompare(k.secret, other.secret) == 1
}

// Bound returns the secret as it is used for a name: that of the host for a host key, that of
// the subsystem for a controller key.
func (k *Key) Bound(nqn string) []byte {
	if k.transform == NoHash {
		return slices.Clone(k.secret)
	}
	return k.transform.mac(k.secret, []byte(nqn), []byte(transformSuffix))
}

// String says what the key is like, without the secret.
func (k Key) String() string { return fmt.Sprintf("key of %d bytes", len(k.secret)) }

// Format keeps every verb of fmt from printing the secret.
func (k Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, k.String()) }

// LogValue keeps slog from printing the secret.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalJSON refuses, so that no structure that has a key leaks it. See Text.
func (k Key) MarshalJSON() ([]byte, error) { return nil, errors.New("a key must not be encoded") }
