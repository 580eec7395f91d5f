package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The writer is the guest that is migrated. It has no file system of the host, with which QEMU
// does not migrate, so it is all that runs: it writes and reads the first disk, and compares.

const (
	writerJobs   = 4
	writerBlock  = 16 << 10
	writerBlocks = 1024 // of a job
	writerKept   = 64   // blocks that a job keeps in memory after it has read them
	writerReport = "writer:"
	writerWrong  = writerReport + " WRONG"
)

// writerMain does not return.
func writerMain() {
	err := loadModules()
	if err == nil {
		err = writeForever("/dev/vda")
	}
	fmt.Println(writerWrong, err)
	for {
		_ = unix.Pause() // the host ends the machine
	}
}

// writeForever returns an error only.
func writeForever(path string) error {
	var disk *os.File
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var err error
		if disk, err = os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	failed := make(chan error, writerJobs)
	var jobs [writerJobs]*writerJob
	var all sync.WaitGroup
	defer all.Wait()
	for i := range jobs {
		mem, err := unix.Mmap(-1, 0, (writerKept+1)*writerBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return err
		}
		jobs[i] = &writerJob{disk: disk, base: int64(i) * writerBlocks * writerBlock, random: rand.New(rand.NewPCG(uint64(i), 0)),
			out: mem[writerKept*writerBlock:], kept: mem[:writerKept*writerBlock]}
		all.Go(func() { failed <- jobs[i].run() })
	}
	for tick := time.Tick(500 * time.Millisecond); ; {
		select {
		case err := <-failed:
			return err
		case <-tick:
			reads, writes := uint64(0), uint64(0)
			for _, j := range jobs {
				reads, writes = reads+j.reads.Load(), writes+j.writes.Load()
			}
			fmt.Printf("%s %d blocks of 16 KiB written, %d read and right\n", writerReport, writes, reads)
		}
	}
}

// writerJob writes and reads an area of the disk.
type writerJob struct {
	disk   *os.File
	base   int64
	random *rand.Rand
	out    []byte               // what is written
	kept   []byte               // what was read
	wrote  [writerBlocks]uint64 // how often each block was written
	holds  [writerKept]stamp    // what each block in kept has
	reads  atomic.Uint64
	writes atomic.Uint64
}

// stamp names the contents of a block.
type stamp struct {
	at    int64
	wrote uint64 // 0: it has none
}

// run writes and reads blocks at random. Before a kept block is read over, it must still have what
// was read to it, perhaps on another machine.
func (j *writerJob) run() error {
	for {
		i := j.random.IntN(writerBlocks)
		s := stamp{j.base + int64(i)*writerBlock, j.wrote[i]}
		if s.wrote == 0 || j.random.IntN(2) == 0 {
			s.wrote++
			s.fill(j.out)
			if n, err := j.disk.WriteAt(j.out, s.at); err != nil {
				return fmt.Errorf("%d bytes written: %w", n, err)
			}
			j.wrote[i] = s.wrote
			j.writes.Add(1)
			continue
		}
		k := j.random.IntN(writerKept)
		block := j.kept[k*writerBlock:][:writerBlock]
		if err := j.holds[k].check(block); err != nil {
			return fmt.Errorf("memory that was read to earlier: %w", err)
		}
		if n, err := j.disk.ReadAt(block, s.at); err != nil {
			return fmt.Errorf("%d bytes read: %w", n, err)
		}
		if err := s.check(block); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		j.holds[k] = s
		j.reads.Add(1)
	}
}

func (s stamp) word(i int) uint64 {
	return (uint64(s.at)<<20 ^ s.wrote ^ uint64(i)<<52) * 0x9E3779B97F4A7C15
}

func (s stamp) fill(b []byte) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], s.word(i/8))
	}
}

func (s stamp) check(b []byte) error {
	if s.wrote == 0 {
		return nil
	}
	for i := 0; i < len(b); i += 8 {
		if got := binary.LittleEndian.Uint64(b[i:]); got != s.word(i/8) {
			return fmt.Errorf("block at %d, write %d: byte %d is %#x, want %#x", s.at, s.wrote, i, got, s.word(i/8))
		}
	}
	return nil
}
