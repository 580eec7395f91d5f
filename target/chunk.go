package target

import (
	"math/bits"

	"ublk-nvmeof/rdma"
)

const (
	listMoves = 512      // see queuePair.maxMoves
	chunkSize = 32 << 10 // bytes; data memory is allocated in whole chunks
	minChunks = 2 * DefaultMaxTransfer / chunkSize
	maxChunks = 128
)

func chunksFor(length uint32) int { return int((length + chunkSize - 1) / chunkSize) }

// extent is a number of adjacent chunks. A transfer is one work request because its
// memory is contiguous.
type extent struct{ first, n uint8 }

var _ [256 - maxChunks]struct{} // an extent can hold every chunk number

// chunks has a bit for each chunk of a queue's data memory, which is set if the
// chunk is free.
type chunks [maxChunks / 64]uint64

// find returns the first of n adjacent free chunks, or -1.
func (c *chunks) find(n int) int {
	for from := 0; ; {
		first := c.next(from, 0)
		if first+n > maxChunks {
			return -1
		}
		if from = c.next(first, ^uint64(0)); from-first >= n {
			return first
		}
	}
}

// next returns the first chunk at or after from that is free, or that is in use if flip
// is all ones. It returns maxChunks if there is none.
func (c *chunks) next(from int, flip uint64) int {
	for from < maxChunks {
		if w := (c[from/64] ^ flip) >> (from % 64); w != 0 {
			return from + bits.TrailingZeros64(w)
		}
		from = from/64*64 + 64
	}
	return maxChunks
}

// take allocates adjacent chunks for length bytes. The caller has checked that there
// are enough.
func (c *chunks) take(length uint32) extent {
	r := extent{n: uint8(chunksFor(length))}
	if r.n > 0 {
		r.first = uint8(c.find(int(r.n)))
		c.flip(r)
	}
	return r
}

// flip marks free chunks as used, and used chunks as free.
func (c *chunks) flip(r extent) {
	for i := int(r.first); i < int(r.first)+int(r.n); i++ {
		c[i/64] ^= 1 << (i % 64)
	}
}

// bytes returns the memory of an extent.
func (q *queuePair) bytes(r extent) []byte {
	data := q.data.Bytes()[int(r.first)*chunkSize:]
	return data[:min(int(r.n)*chunkSize, len(data))] // before Connect there is only a part of one chunk
}

// transfer queues the RDMA READs or WRITEs that move length bytes between the host's
// memory and the chunks of a command. The last READ completes after the others.
func (q *queuePair) transfer(i int, op rdma.SendOp, length uint32) {
	r := &q.reqs[i]
	if length == 0 || op == rdma.Write && r.corrupt == CorruptLost {
		return
	}
	if op == rdma.Write && r.corrupt == CorruptData {
		q.spoil(r)
	}
	if r.listed == 0 {
		q.move(r, op, r.addr, r.key, 0, length)
	}
	at := uint32(0)
	for d := range int(r.listed) {
		addr, n, key, _, _ := q.descriptor(i, d).Keyed()
		if n = min(n, length-at); n > 0 {
			q.move(r, op, addr, key, at, n)
			at += n
		}
	}
	if op == rdma.Read {
		last := &q.sends[len(q.sends)-1]
		last.ID, last.Signaled = kindRead|uint64(i), true
	}
}

// move queues one RDMA READ or WRITE for length bytes from the byte at of a command's data on.
func (q *queuePair) move(r *request, op rdma.SendOp, remote uint64, key, at, length uint32) {
	r.moves++
	q.moves--
	q.sends = append(q.sends, rdma.SendWR{
		ID: kindData, Op: op, RemoteAddr: remote, RKey: key, NumSGE: 1,
		SGE: [2]rdma.SGE{{Addr: q.data.Addr() + uint64(r.data.first)*chunkSize + uint64(at), Length: length, LKey: q.data.LKey()}},
	})
}
