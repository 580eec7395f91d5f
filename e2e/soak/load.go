package main

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// load keeps a disk busy over several connections and checks every answer.
type load struct {
	disk    *disk
	clients []*client
	stop    atomic.Bool
	wg      sync.WaitGroup

	requests atomic.Int64
	longest  atomic.Int64 // in nanoseconds
}

const maxBlocks = 32 // of a request

func startLoad(d *disk, socket, export string, connections, depth int) *load {
	l := &load{disk: d}
	for range connections {
		c := newClient(socket, export)
		l.clients = append(l.clients, c)
		for range depth {
			l.wg.Add(1)
			go l.work(c)
		}
	}
	return l
}

// work sends requests at random, one at a time.
func (l *load) work(c *client) {
	defer l.wg.Done()
	data := make([]byte, maxBlocks*blockSize)
	for !l.stop.Load() {
		n := 1 + rand.IntN(maxBlocks)
		if rand.IntN(3) > 0 {
			n = 1 + rand.IntN(4)
		}
		switch what := rand.IntN(100); {
		case what < 45:
			l.read(c, data, rand.IntN(l.disk.blocks-n), n)
		case what < 97:
			l.write(c, data, n, what >= 90)
		default:
			acked, epoch := l.disk.beginFlush()
			l.do(c, &request{kind: nbdFlush})
			l.disk.endFlush(acked, epoch)
		}
	}
}

func (l *load) read(c *client, data []byte, first, n int) {
	oldest, epoch := l.disk.beginRead(first, n)
	data = data[:n*blockSize]
	l.do(c, &request{kind: nbdRead, offset: first * blockSize, length: len(data), data: data})
	if err := l.disk.endRead(data, first, oldest, epoch); err != nil {
		fatalf("%v", err)
	}
}

func (l *load) write(c *client, data []byte, n int, zeroes bool) {
	first, versions, epoch := l.disk.beginWrite(n, zeroes)
	r := &request{kind: nbdWrite, offset: first * blockSize, length: len(versions) * blockSize}
	if zeroes {
		r.kind = nbdWriteZeroes
	} else {
		r.data = data[:r.length]
		for i, version := range versions {
			l.disk.fill(r.data[i*blockSize:][:blockSize], first+i, version)
		}
	}
	if rand.IntN(10) == 0 {
		r.flags = nbdFUA
	}
	l.do(c, r)
	l.disk.endWrite(first, versions, epoch, r.flags&nbdFUA != 0)
}

// do fails the soak if the request fails.
func (l *load) do(c *client, r *request) {
	if errno := c.do(r); errno != 0 {
		fatalf("export %s: request %d of %d bytes at %d: %v", c.export, r.kind, r.length, r.offset, errno)
	}
	took := time.Since(r.begun)
	l.requests.Add(1)
	for old := l.longest.Load(); int64(took) > old && !l.longest.CompareAndSwap(old, int64(took)); old = l.longest.Load() {
	}
}

// connects is how often the connections were made.
func (l *load) connects() (n int) {
	for _, c := range l.clients {
		c.mu.Lock()
		n += c.connects
		c.mu.Unlock()
	}
	return n
}

// finish ends the load, flushes, and reads everything once more.
func (l *load) finish() {
	l.stop.Store(true)
	l.wg.Wait()
	c := l.clients[0]
	acked, epoch := l.disk.beginFlush()
	l.do(c, &request{kind: nbdFlush})
	l.disk.endFlush(acked, epoch)
	data := make([]byte, maxBlocks*blockSize)
	for first := 0; first < l.disk.blocks; first += maxBlocks {
		l.read(c, data, first, maxBlocks)
	}
	for _, c := range l.clients {
		c.close()
	}
}
