package e2e

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What TestDurability writes: blocks that say where they belong and which write of
// that block they are.
const (
	durableBlock  = 4096
	durableBlocks = 1024
	durableLanes  = 4  // each has a part of the blocks
	flushEvery    = 16 // writes of a lane
)

// rounds is how often what is named by UN_DURABILITY happens.
func rounds(t *testing.T) int {
	text := os.Getenv("UN_DURABILITY")
	if text == "" {
		return 3
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("UN_DURABILITY is %q, want a number", text)
	}
	return n
}

// blockLog is what is known of each block's versions.
type blockLog struct {
	mu      sync.Mutex
	epoch   int                   // lives of the target
	issued  [durableBlocks]uint64 // last one that was given to the device
	acked   [durableBlocks]uint64 // last one that it confirmed
	flushed [durableBlocks]uint64 // last one before a flush that it confirmed
}

func fillBlock(b []byte, block int, version uint64) {
	for i := 0; i < len(b)-4; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(block))
		if i+16 <= len(b)-4 {
			binary.LittleEndian.PutUint64(b[i+8:], version)
		}
	}
	binary.LittleEndian.PutUint64(b[8:], version)
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.ChecksumIEEE(b[:len(b)-4]))
}

// blockVersion reads what fillBlock wrote; 0 for a block never written.
func blockVersion(b []byte, block int) (uint64, error) {
	version := binary.LittleEndian.Uint64(b[8:])
	if version == 0 && binary.LittleEndian.Uint64(b) == 0 {
		return 0, nil
	}
	want := make([]byte, len(b))
	fillBlock(want, block, version)
	if string(want) != string(b) {
		return 0, errors.New("it is no block, or another's")
	}
	return version, nil
}

// write writes blocks at random until stop is closed, and flushes now and then.
func (l *blockLog) write(file *os.File, lane int, stop chan struct{}) error {
	// O_DIRECT wants memory that is aligned.
	mem, err := unix.Mmap(-1, 0, durableBlock, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	for n := 1; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		block := lane + durableLanes*rand.IntN(durableBlocks/durableLanes)
		l.mu.Lock()
		l.issued[block]++
		version, epoch := l.issued[block], l.epoch
		l.mu.Unlock()
		fillBlock(mem, block, version)
		if _, err := file.WriteAt(mem, int64(block)*durableBlock); err != nil {
			return err
		}
		l.mu.Lock()
		if epoch == l.epoch {
			l.acked[block] = version
		}
		acked := l.acked
		l.mu.Unlock()
		if n%flushEvery != 0 {
			continue
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			return err
		}
		l.mu.Lock()
		if epoch == l.epoch { // else it may be another target's cache that was flushed
			for i := range acked {
				l.flushed[i] = max(l.flushed[i], acked[i])
			}
		}
		l.mu.Unlock()
	}
}

// judge compares a disk whose target was killed with the log, and begins the next
// life.
func (l *blockLog) judge(t *testing.T, disk string) (lost, ahead int) {
	data, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	for block := range durableBlocks {
		version, err := blockVersion(data[block*durableBlock:][:durableBlock], block)
		switch {
		case err != nil:
			t.Errorf("block %d: %v", block, err)
		case version < l.flushed[block]:
			t.Errorf("block %d is version %d, and version %d was flushed", block, version, l.flushed[block])
		case version > l.issued[block]:
			t.Errorf("block %d is version %d, and the last that was written is %d", block, version, l.issued[block])
		case version < l.acked[block]:
			lost++
		case version > l.flushed[block]:
			ahead++
		}
		l.acked[block], l.flushed[block] = version, version
	}
	l.epoch++
	return lost, ahead
}

// TestDurability kills a target with a volatile write cache at random moments and
// compares what is on its disk with what was written and flushed: nothing that was
// flushed is missing or old. The device stays, and waits for the next target.
func TestDurability(t *testing.T) {
	if part, _ := share(t); part != 0 {
		t.Log("another kernel runs this test")
		return
	}
	n := rounds(t)
	leavesNothing(t)
	run(t, "lab", "outside", labMTU)
	t.Cleanup(func() { run(t, "lab", "clean") })
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, durableBlocks*durableBlock), 0o600); err != nil {
		t.Fatal(err)
	}
	var target *exec.Cmd
	start := func() {
		target = exec.Command("ip", "netns", "exec", "outside", "ublk-nvmeof", "target", "--provider", "roce", "-a", "10.0.4.1",
			"-n", labNQN, "--namespace", "file="+disk+",cache=1MiB,uuid=6a1c2f0e-5b0e-4d6e-9d5a-2f1f6c3b7a10")
		target.Stderr = os.Stderr
		if err := target.Start(); err != nil {
			t.Fatal(err)
		}
	}
	kill := func() {
		if err := target.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = target.Wait() // killed, as it says
	}
	start()
	t.Cleanup(func() {
		run(t, "ublk-nvmeof", "target", "stop")
		if err := target.Wait(); err != nil {
			t.Error(err)
		}
	})
	run(t, "ublk-nvmeof", "connect", "-a", "10.0.4.1", "-n", labNQN, "-i2", "-W1", "-P1", "-c1", "-l-1", "--device-id=0")
	t.Cleanup(func() { run(t, "ublk-nvmeof", "disconnect", "-n", labNQN) })

	var log blockLog
	stop := make(chan struct{})
	lanes := make(chan error, durableLanes)
	file, err := os.OpenFile("/dev/ublkb0", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	for lane := range durableLanes {
		go func() { lanes <- log.write(file, lane, stop) }()
	}
	count := func() (issued uint64) {
		log.mu.Lock()
		defer log.mu.Unlock()
		for _, v := range log.issued {
			issued += v
		}
		return issued
	}
	var lost, ahead int
	for range n {
		// Under way again, and then at a random moment.
		began := count()
		for deadline := time.Now().Add(time.Minute); count() < began+4*durableLanes*flushEvery; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("nothing is written any more")
			}
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		kill()
		log.mu.Lock()
		l, a := log.judge(t, disk)
		log.mu.Unlock()
		lost, ahead = lost+l, ahead+a
		start()
	}
	close(stop)
	for range durableLanes {
		if err := <-lanes; err != nil {
			t.Error(err)
		}
	}
	if err := file.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("killed %d times in %d writes: of blocks that were confirmed and not flushed %d were lost; %d were ahead of their flush", n, count(), lost, ahead)
	if lost == 0 && n > 1 {
		t.Error("the target lost nothing, so it has no volatile cache")
	}
}
