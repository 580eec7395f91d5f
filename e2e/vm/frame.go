package main

import (
	"encoding/binary"
	"fmt"
	"io"
)

// The guest and the host talk over one virtio-serial port in frames, so that
// the exit code cannot overtake the output before it.
type frameKind byte

const (
	frameInvalid frameKind = iota
	frameReady             // guest: the command starts
	frameStdout            // guest: bytes of standard output
	frameStderr            // guest: bytes of standard error
	frameExit              // guest: the command's exit code, in decimal
	frameFail              // guest: why the command could not be run
	frameSignal            // host: one byte, the signal for the command
	frameDump              // host: print blocked tasks to the console
)

// portName is the port's name under /sys/class/virtio-ports.
const portName = "vm.control"

// maxFrame bounds a payload, in bytes.
const maxFrame = 64 << 10

// writeFrame writes kind, payload length (32 bits, little endian), payload, in
// one Write.
func writeFrame(w io.Writer, kind frameKind, payload []byte) error {
	b := make([]byte, 5, 5+len(payload))
	b[0] = byte(kind)
	binary.LittleEndian.PutUint32(b[1:], uint32(len(payload)))
	if _, err := w.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// readFrame returns io.EOF at the end of the stream between two frames.
func readFrame(r io.Reader) (frameKind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frameInvalid, nil, err
	}
	n := binary.LittleEndian.Uint32(head[1:])
	if n > maxFrame {
		return frameInvalid, nil, fmt.Errorf("read frame: length %d over %d", n, maxFrame)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return frameInvalid, nil, fmt.Errorf("read frame: %w", err)
	}
	return frameKind(head[0]), payload, nil
}
