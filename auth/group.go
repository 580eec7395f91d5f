package auth

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"sync"
)

// Group is a group for the Diffie-Hellman exchange. The value is its id in messages.
type Group uint8

// Groups (RFC 7919, appendix A). With Null there is no exchange: an observer of a run can
// then try keys at leisure.
const (
	Null Group = iota
	FFDHE2048
	FFDHE3072
	FFDHE4096
	FFDHE6144
	FFDHE8192
)

var two = big.NewInt(2)

var groups = [...]struct {
	name     string
	size     int // bytes of the prime and of a public value
	exponent int // bytes of a private value: twice the strength, as in Linux' crypto/dh.c
	prime    func() *big.Int
}{
	Null:      {"null", 0, 0, nil},
	FFDHE2048: {"ffdhe2048", 256, 32, prime(2048, 560316)},
	FFDHE3072: {"ffdhe3072", 384, 32, prime(3072, 2625351)},
	FFDHE4096: {"ffdhe4096", 512, 64, prime(4096, 5736041)},
	FFDHE6144: {"ffdhe6144", 768, 64, prime(6144, 15705020)},
	FFDHE8192: {"ffdhe8192", 1024, 64, prime(8192, 10965728)},
}

// Groups returns all groups, the weakest first.
func Groups() []Group { return []Group{Null, FFDHE2048, FFDHE3072, FFDHE4096, FFDHE6144, FFDHE8192} }

// String returns a name like "ffdhe2048".
func (g Group) String() string {
	if int(g) < len(groups) {
		return groups[g].name
	}
	return fmt.Sprintf("group %d", uint8(g))
}

func (g Group) known() bool { return int(g) < len(groups) }

// Size returns the length of a public value in bytes, 0 for Null.
func (g Group) Size() int {
	if g.known() {
		return groups[g].size
	}
	return 0
}

// prime computes a prime of b bits by the formula of RFC 7919:
//
//	p = 2^b - 2^(b-64) + (floor(2^(b-130) e) + x) 2^64 - 1
func prime(b uint, x int64) func() *big.Int {
	return sync.OnceValue(func() *big.Int {
		one := big.NewInt(1)
		p := new(big.Int).Lsh(one, b)
		p.Sub(p, new(big.Int).Lsh(one, b-64))
		middle := scaledE(b - 130)
		middle.Add(middle, big.NewInt(x))
		p.Add(p, middle.Lsh(middle, 64))
		return p.Sub(p, one)
	})
}

// scaledE returns floor(2^n e), computed by the series of 1/k! with 64 bits to spare.
func scaledE(n uint) *big.Int {
	term := new(big.Int).Lsh(big.NewInt(1), n+64)
	sum := new(big.Int).Set(term)
	for k := int64(1); term.Sign() > 0; k++ {
		term.Quo(term, big.NewInt(k))
		sum.Add(sum, term)
	}
	return sum.Rsh(sum, 64)
}

// exchange is one side of a Diffie-Hellman exchange.
type exchange struct {
	group   Group
	private *big.Int
	public  []byte // big endian, of the size of the prime
}

// newExchange makes a random private value. For Null the exchange is empty.
func newExchange(g Group) *exchange {
	x := make([]byte, groups[g].exponent)
	rand.Read(x) // never fails
	return exchangeOf(g, x)
}

// exchangeOf returns the exchange with a private value, in big endian.
func exchangeOf(g Group, private []byte) *exchange {
	e := &exchange{group: g, private: new(big.Int).SetBytes(private)}
	if g != Null {
		e.public = new(big.Int).Exp(two, e.private, groups[g].prime()).FillBytes(make([]byte, g.Size()))
	}
	return e
}

// shared returns the shared value, in big endian and of the size of the prime. It fails if
// the peer's public value has the wrong size or is none of 2..p-2, whose powers an attacker
// would know.
func (e *exchange) shared(peer []byte) ([]byte, error) {
	if len(peer) != e.group.Size() {
		return nil, fmt.Errorf("the public value has %d bytes; %v has %d", len(peer), e.group, e.group.Size())
	}
	if e.group == Null {
		return nil, nil
	}
	p := groups[e.group].prime()
	y := new(big.Int).SetBytes(peer)
	if y.Cmp(two) < 0 || y.Cmp(new(big.Int).Sub(p, two)) > 0 {
		return nil, errors.New("the public value is not in the range 2 to p-2")
	}
	return y.Exp(y, e.private, p).FillBytes(make([]byte, e.group.Size())), nil
}
