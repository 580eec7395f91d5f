package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The disk with the writable layer of the root file system.
const (
	layerSerial = "layer"
	layerSize   = 4 << 30 // bytes; the image takes as many as are used
)

// makeDisk makes the image of a disk with an empty file system, unless it exists.
func makeDisk(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(layerSize), f.Close()); err != nil {
		return err
	}
	if _, err := output("", "/sbin/mkfs.ext4", "-q", "-F", path); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// mountLayer mounts the disk with the writable layer, in the guest. The modules for it are not
// among those of the initramfs.
func mountLayer(c guestConfig) error {
	base, _, _ := strings.Cut(c.Modules, "/lib/modules/")
	load := exec.Command("/sbin/modprobe", "-a", "-d", base, "virtio_blk", "ext4")
	load.Dir = "/"
	load.SysProcAttr = &syscall.SysProcAttr{Chroot: "/host"}
	if out, err := load.CombinedOutput(); err != nil {
		return fmt.Errorf("load modules of the disk: %w: %s", err, out)
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		names, err := filepath.Glob("/sys/block/vd*/serial")
		if err != nil {
			return err
		}
		for _, n := range names {
			if text, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(text)) == layerSerial {
				return mount("ext4", "/dev/"+filepath.Base(filepath.Dir(n)), "/memory", "")
			}
		}
	}
	return errors.New("no disk with the writable layer")
}
