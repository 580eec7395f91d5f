package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// fio verifies export 3 whenever there is a server: its NBD engine does not connect
// again.
type fio struct {
	socket, output string
	cmd            *exec.Cmd
	done           chan struct{}
	begun          time.Time
	runs           int
	requests       int
	longest        time.Duration
}

func startFio(socket, dir string) *fio {
	f := &fio{socket: socket, output: filepath.Join(dir, "fio.json")}
	f.resume()
	return f
}

// resume starts fio, if it does not run.
func (f *fio) resume() {
	if f.cmd != nil {
		return
	}
	f.cmd = exec.Command("fio", "--name=verify", "--ioengine=nbd", "--uri=nbd+unix:///3?socket="+f.socket,
		"--rw=randrw", "--bsrange=4k-64k", "--iodepth=8", "--serialize_overlap=1", "--size=32m", "--randrepeat=0", "--time_based",
		"--runtime=36000", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--verify_state_save=0", "--output-format=json", "--output="+f.output)
	if err := f.cmd.Start(); err != nil {
		fatalf("fio: %v", err)
	}
	f.begun = time.Now()
	f.done = waitFor(f.cmd)
	f.runs++
}

// check fails if fio has ended.
func (f *fio) check() {
	select {
	case <-f.done:
		text, _ := os.ReadFile(f.output)
		fatalf("fio has ended: %v\n%s", f.cmd.ProcessState, text)
	default:
	}
}

// pause ends fio in order, before the server ends.
func (f *fio) pause() {
	if f.cmd == nil {
		return
	}
	time.Sleep(time.Until(f.begun.Add(2 * time.Second))) // before, it might end without a word
	f.check()
	if err := f.cmd.Process.Signal(syscall.SIGINT); err != nil {
		fatalf("end fio: %v", err)
	}
	select {
	case <-f.done:
	case <-time.After(progressLimit):
		fatalf("fio does not end")
	}
	f.cmd = nil
	if err := f.read(); err != nil {
		fatalf("fio: %v", err)
	}
}

// read adds the figures of a run, and returns its error.
func (f *fio) read() error {
	text, err := os.ReadFile(f.output)
	if err != nil {
		return err
	}
	type direction struct {
		Latency struct {
			Max int64 `json:"max"`
		} `json:"clat_ns"`
		Requests int `json:"total_ios"`
	}
	var out struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	_, object, found := strings.Cut(string(text), "{")
	if !found {
		return fmt.Errorf("output is %q", text)
	}
	if err := json.Unmarshal([]byte("{"+object), &out); err != nil {
		return fmt.Errorf("%w\n%s", err, text)
	}
	if len(out.Jobs) != 1 {
		return errors.New("no job")
	}
	j := out.Jobs[0]
	if j.Error != 0 {
		return fmt.Errorf("%w\n%s", syscall.Errno(j.Error), text)
	}
	f.requests += j.Read.Requests + j.Write.Requests
	f.longest = max(f.longest, time.Duration(j.Read.Latency.Max), time.Duration(j.Write.Latency.Max))
	return nil
}

func (f *fio) finish() { f.pause() }

func (f *fio) summary() string {
	return fmt.Sprintf("%d runs, %d requests, longest took %v", f.runs, f.requests, f.longest.Round(time.Millisecond))
}
