package nbd

import (
	"ublk-nvmeof/block"
)

// piece is a part of a request that one tag transfers.
type piece struct {
	sector  uint64 // first sector; the back end transfers whole blocks
	sectors uint32
	skip    uint32 // bytes before the client's bytes
	length  uint32 // number of the client's bytes
}

// partial reports whether the client's bytes are less than whole blocks.
func (p *piece) partial() bool { return p.length < p.sectors<<block.SectorShift }

// readPiece returns the first piece of a read of the bytes from at to end. The piece has
// up to most bytes.
func (s *shard) readPiece(at, end uint64, most uint32) piece {
	unit := uint64(s.bounds.block)
	return s.piece(at, end, (end+unit-1)&^(unit-1), most)
}

// writePiece returns the first piece of a write: whole blocks, or a part of one block.
func (s *shard) writePiece(at, end uint64) piece {
	unit := uint64(s.bounds.block)
	first, last := at&^(unit-1), end&^(unit-1)
	if at != first || last <= first {
		last = first + unit
	}
	return s.piece(at, end, last, s.bounds.piece)
}

// piece returns the first piece of a transfer of the bytes from at to end. Its blocks end
// at last or before.
func (s *shard) piece(at, end, last uint64, most uint32) piece {
	b := &s.bounds
	first := at &^ uint64(b.block-1)
	n := min(last-first, uint64(most))
	if b.chunk > 0 {
		n = min(n, b.chunk-first%b.chunk)
	}
	return piece{
		sector: first >> block.SectorShift, sectors: uint32(n >> block.SectorShift),
		skip: uint32(at - first), length: uint32(min(first+n, end) - at),
	}
}

// pieces returns the number of pieces of up to size bytes in a read, but at most most.
func (s *shard) pieces(at, end uint64, size uint32, most int) int {
	n := 0
	for ; at < end && n < most; n++ {
		p := s.readPiece(at, end, size)
		at += uint64(p.length)
	}
	return n
}

// pieceSize chooses the size of the pieces of a read. It returns the size and the number
// of pieces, which is at most share+1. Usually a piece is as large as the device accepts.
// If that would take more tags than a connection may hold, a piece is as large as a
// buffer, and issue passes it to the device in parts.
func (s *shard) pieceSize(at, end uint64) (size uint32, n int) {
	size = s.bounds.piece
	if n = s.pieces(at, end, size, s.share+1); n > s.share && size < s.bounds.buffer {
		size = s.bounds.buffer
		n = s.pieces(at, end, size, s.share+1)
	}
	return size, n
}

// data returns the memory of the client's bytes of a tag. In a write to a part of a
// block, they are behind the block in the buffer, until merge.
func (s *shard) data(i uint16) []byte {
	g := &s.tags[i]
	at := g.skip
	if g.task.kind == cmdWrite && g.partial() {
		at = s.bounds.block
	}
	return s.back.Buffer(i)[at : at+g.length]
}

// merge copies the client's bytes into their block, which was read before.
func (s *shard) merge(i uint16) {
	g := &s.tags[i]
	into := s.back.Buffer(i)[g.skip : g.skip+g.length]
	if g.task.kind == cmdZeroes {
		clear(into)
		return
	}
	copy(into, s.data(i))
}

// start issues a tag, now or when its stripes are free.
func (s *shard) start(i uint16) {
	g := &s.tags[i]
	g.task.busy++
	if !s.lock(g) {
		s.stripes.parked.Add(1)
		s.parked = append(s.parked, i) // unpark tries again before the loop sleeps
		return
	}
	s.issue(i)
}

// lock locks the stripes of a change. It returns false if they are not free.
func (s *shard) lock(g *tag) bool {
	switch {
	case g.task.kind == cmdRead, g.op == block.OpFlush:
		return true
	case g.partial():
		return s.stripes.exclude(g.sector)
	}
	return s.stripes.share(g.sector, g.sectors)
}

func (s *shard) unlock(g *tag) {
	switch {
	case g.task.kind == cmdRead, g.op == block.OpFlush:
	case g.partial():
		s.stripes.include(g.sector)
	default:
		s.stripes.unshare(g.sector, g.sectors)
	}
}

// unpark issues parked tags whose stripes are now free, and returns their number.
func (s *shard) unpark() int {
	if len(s.parked) == 0 {
		return 0
	}
	n := 0
	for _, i := range s.parked {
		if s.lock(&s.tags[i]) {
			s.stripes.parked.Add(-1)
			s.issue(i)
			continue
		}
		s.parked[n] = i
		n++
	}
	started := len(s.parked) - n
	s.parked = s.parked[:n]
	return started
}

// issue passes a tag to the back end with the next Submit. If the piece is larger than
// the device accepts now, it is passed in parts. The back end transfers to and from the
// beginning of the buffer. So the parts of a write are moved there one after the other,
// and the parts of a read are moved away from there, the last part first.
func (s *shard) issue(i uint16) {
	g := &s.tags[i]
	r := block.Request{Sector: g.sector, Sectors: g.sectors - g.moved, Tag: i, Op: g.op}
	switch g.op {
	case block.OpRead:
		left := r.Sectors
		r.Sectors = min(left, s.bounds.piece>>block.SectorShift)
		r.Sector += uint64(left - r.Sectors)
	case block.OpWrite:
		r.Sectors = min(r.Sectors, s.bounds.piece>>block.SectorShift)
		if g.moved > 0 {
			r.Sectors = min(r.Sectors, g.moved) // so that the part does not overwrite the rest
			from := g.moved << block.SectorShift
			buf := s.back.Buffer(i)
			copy(buf, buf[from:from+r.Sectors<<block.SectorShift])
		}
		r.Sector += uint64(g.moved)
		r.Flags = g.task.flags
	case block.OpFlush:
		r.Sector, r.Sectors = 0, 0
	default:
		r.Flags = g.task.flags
	}
	g.active = r.Sectors
	s.reqs = append(s.reqs, r)
}

// shrunk reports whether a request that the back end refused is larger than the device
// now accepts.
func (s *shard) shrunk(g *tag) bool {
	s.refresh()
	switch g.op {
	case block.OpRead, block.OpWrite:
		return g.active > s.bounds.piece>>block.SectorShift
	case block.OpDiscard:
		return g.active > s.bounds.discard
	case block.OpWriteZeroes:
		return g.active > s.bounds.zeroes
	}
	return false
}

// finish handles a tag that the back end has returned.
func (s *shard) finish(i uint16, errno uint16) {
	g := &s.tags[i]
	t := g.task
	switch {
	case errno != 0 && s.shrunk(g):
		if g.op == block.OpRead || g.op == block.OpWrite {
			s.issue(i)
			return
		}
	case errno != 0:
		t.fail(codeOf(errno))
	default:
		if s.proceed(i) {
			return
		}
	}
	s.unlock(g)
	t.busy--
	switch t.kind {
	case cmdRead:
		t.conn.readDone(i)
	case cmdWrite:
		s.release(i)
		t.conn.writeDone(t)
	default:
		if t.code != 0 || !s.advance(i) {
			s.release(i)
			t.conn.answer(t)
		}
	}
}

// proceed records a success of the back end. If there is more to do for the same piece,
// it issues the next request and returns true.
func (s *shard) proceed(i uint16) (more bool) {
	g := &s.tags[i]
	if g.op == block.OpRead {
		left := (g.sectors - g.moved) << block.SectorShift
		if n := g.active << block.SectorShift; n < left {
			buf := s.back.Buffer(i)
			copy(buf[left-n:left], buf[:n])
		}
	}
	g.moved += g.active
	switch {
	case g.op == block.OpFlush:
		return false
	case g.moved < g.sectors:
	case g.op == block.OpRead && g.task.kind != cmdRead:
		s.merge(i)
		g.op, g.moved = block.OpWrite, 0
	default:
		if g.task.kind == cmdTrim || g.task.kind == cmdZeroes {
			g.task.at += uint64(g.length)
		}
		return false
	}
	s.issue(i)
	return true
}

// advance starts the next step of a flush, trim or write zeroes. It returns false if there
// is none left. A long range is done in several steps. FUA of a trim is a flush at the end.
func (s *shard) advance(i uint16) bool {
	g := &s.tags[i]
	t := g.task
	if t.at < t.end && (t.kind == cmdTrim && s.bounds.discard == 0 || t.kind == cmdZeroes && s.bounds.zeroes == 0) {
		s.refresh() // the client was told that the device supports it
	}
	switch {
	case t.kind == cmdTrim && t.at < t.end && s.bounds.discard > 0:
		g.op, g.piece = block.OpDiscard, s.step(t, s.bounds.discard)
	case t.kind == cmdZeroes && t.at < t.end:
		g.piece = s.writePiece(t.at, t.end)
		switch {
		case g.partial():
			g.op = block.OpRead
		case s.bounds.zeroes > 0:
			g.op, g.piece = block.OpWriteZeroes, s.step(t, s.bounds.zeroes)
		default: // the device does not support it any more, so zeroes are written
			g.op = block.OpWrite
			clear(s.back.Buffer(i)[:g.length])
		}
	case t.sync:
		t.sync = false
		g.op, g.piece = block.OpFlush, piece{}
	default:
		return false
	}
	g.moved = 0
	s.start(i)
	return true
}

// step returns the next piece of a trim or write zeroes: whole blocks, up to most
// sectors.
func (s *shard) step(t *task, most uint32) piece {
	last := t.end &^ uint64(s.bounds.block-1)
	n := min((last-t.at)>>block.SectorShift, uint64(most))
	return piece{sector: t.at >> block.SectorShift, sectors: uint32(n), length: uint32(n << block.SectorShift)}
}
