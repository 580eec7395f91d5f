package target

import "ublk-nvmeof/rdma"

const (
	chunkSize = 32 << 10 // bytes of one data buffer; a transfer takes as many as it needs
	minChunks = DefaultMaxTransfer / chunkSize
	maxChunks = 128
	noChunk   = -1
)

func chunksFor(length uint32) int { return int((length + chunkSize - 1) / chunkSize) }

// take makes a list of n chunks, of which there are enough.
func (q *queue) take(n int) int32 {
	list := int32(noChunk)
	for range n {
		c := q.free
		q.free = q.next[c]
		q.next[c] = list
		list = c
	}
	q.nfree -= n
	return list
}

func (q *queue) releaseChunk(c int32) {
	q.next[c] = q.free
	q.free = c
	q.nfree++
}

func (q *queue) releaseChunks(list int32) {
	for list != noChunk {
		c := list
		list = q.next[c]
		q.releaseChunk(c)
	}
}

// bytes is a chunk.
func (q *queue) bytes(c int32) []byte {
	return q.data.Bytes()[int(c)*chunkSize : (int(c)+1)*chunkSize]
}

// transfer makes the RDMA READs or WRITEs of length bytes of a command's data,
// from or into its chunks.
func (q *queue) transfer(i int, op rdma.SendOp, length uint32) {
	r := &q.reqs[i]
	if op == rdma.Write && r.corrupt == CorruptData {
		q.spoil(r)
	}
	addr := r.addr
	for c := r.chunks; c != noChunk && length > 0; c = q.next[c] {
		n := min(length, chunkSize)
		wr := rdma.SendWR{
			ID: kindChunk, Op: op, RemoteAddr: addr, RKey: r.key, NumSGE: 1,
			SGE: [2]rdma.SGE{{Addr: q.data.Addr() + uint64(c)*chunkSize, Length: n, LKey: q.data.LKey()}},
		}
		addr += uint64(n)
		if length -= n; length == 0 && op == rdma.Read {
			wr.ID, wr.Signaled = kindRead|uint64(i), true
		}
		q.sends = append(q.sends, wr)
	}
}
