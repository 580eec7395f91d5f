package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"
)

// Hash is a hash function. The value is its id in messages and in the text of keys.
type Hash uint8

// Hash functions.
const (
	NoHash Hash = iota // a key that is used as it is
	SHA256
	SHA384
	SHA512
)

var hashes = [...]struct {
	name string
	size int
	new  func() hash.Hash
}{
	NoHash: {"none", 0, nil},
	SHA256: {"sha256", sha256.Size, sha256.New},
	SHA384: {"sha384", sha512.Size384, sha512.New384},
	SHA512: {"sha512", sha512.Size, sha512.New},
}

// Hashes returns all hash functions, the weakest first.
func Hashes() []Hash { return []Hash{SHA256, SHA384, SHA512} }

// String returns a name like "sha256".
func (h Hash) String() string {
	if int(h) < len(hashes) {
		return hashes[h].name
	}
	return fmt.Sprintf("hash %d", uint8(h))
}

// Size returns the length of the hash in bytes: 32, 48 or 64, or 0 if there is no such
// function.
func (h Hash) Size() int {
	if int(h) < len(hashes) {
		return hashes[h].size
	}
	return 0
}

// mac returns the HMAC of the parts.
func (h Hash) mac(key []byte, parts ...[]byte) []byte {
	m := hmac.New(hashes[h].new, key)
	for _, p := range parts {
		m.Write(p) // never fails
	}
	return m.Sum(nil)
}

// sum returns the hash of b.
func (h Hash) sum(b []byte) []byte {
	s := hashes[h].new()
	s.Write(b) // never fails
	return s.Sum(nil)
}
