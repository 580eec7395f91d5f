package nvme

import "testing"

// The slab is a variable of the package so that the compiler can neither keep
// the command in registers nor drop the stores.
var (
	slab    [128 * CommandSize]byte
	replies [128 * CompletionSize]byte
	sink    uint64
)

func buildRead(i int) {
	c := CommandAt(slab[i&127*CommandSize:])
	c.SetRead(1, uint64(i)*8, 8, false)
	c.SetKeyedSGL(uint64(i)<<12, 4096, 0x1234, false)
	c.SetCID(uint16(i))
}

func buildWrite(i int) {
	c := CommandAt(slab[i&127*CommandSize:])
	c.SetWrite(1, uint64(i)*8, 8, i&1 != 0)
	c.SetInCapsuleSGL(0, 4096)
	c.SetCID(uint16(i))
}

func buildDSM(i int) {
	c := CommandAt(slab[i&127*CommandSize:])
	c.SetDSM(1, 1)
	c.SetKeyedSGL(uint64(i)<<12, 4096, 0x1234, false)
	c.SetCID(uint16(i))
	PutDSMRange(replies[:], 0, 8, uint64(i))
}

func decode(i int) {
	c := CompletionAt(replies[i&127*CompletionSize:])
	if s := c.Status(); !s.OK() {
		sink += uint64(s.Errno())
	}
	sink += uint64(c.CID()) + uint64(c.SQHead()) + c.Result()
}

func parse(i int) {
	c := CommandAt(slab[i&127*CommandSize:])
	addr, length, key, _, _ := c.KeyedSGL()
	off, n, _ := c.InCapsuleSGL()
	sink += addr + uint64(length) + uint64(key) + off + uint64(n) + c.SLBA() + uint64(c.NLB())
	if IsWrite(c) && c.FUA() {
		sink++
	}
}

func reply(i int) {
	CompletionAt(replies[i&127*CompletionSize:]).Set(0, uint16(i), uint16(i), StatusSuccess)
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	for name, f := range map[string]func(int){
		"read": buildRead, "write": buildWrite, "dsm": buildDSM, "decode": decode, "parse": parse, "reply": reply,
		"flush":        func(i int) { CommandAt(slab[:]).SetFlush(1) },
		"write zeroes": func(i int) { CommandAt(slab[:]).SetWriteZeroes(1, uint64(i), 8, false, true) },
		"keep alive":   func(i int) { CommandAt(slab[:]).SetKeepAlive() },
	} {
		i := 0
		if n := testing.AllocsPerRun(1000, func() { f(i); i++ }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func bench(b *testing.B, f func(int)) {
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		f(i)
		i++
	}
}

func BenchmarkBuildRead(b *testing.B)        { bench(b, buildRead) }
func BenchmarkBuildWrite(b *testing.B)       { bench(b, buildWrite) }
func BenchmarkBuildDSM(b *testing.B)         { bench(b, buildDSM) }
func BenchmarkDecodeCompletion(b *testing.B) { bench(b, decode) }
func BenchmarkParseCommand(b *testing.B)     { bench(b, parse) }
func BenchmarkReply(b *testing.B)            { bench(b, reply) }
