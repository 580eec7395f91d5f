package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ublk-nvmeof/block"
)

// userTick is the unit of /proc/stat: 1/USER_HZ.
const userTick = 10 * time.Millisecond

// cpuUse is the machine's state at one moment.
type cpuUse struct {
	at       time.Time
	idle     time.Duration // summed over the CPUs, since boot
	switches uint64        // context switches since boot
}

func readCPUUse() (cpuUse, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuUse{}, err
	}
	u, err := parseCPUUse(data)
	u.at = time.Now()
	return u, err
}

// parseCPUUse reads /proc/stat. Only the idle columns are used: the kernel takes
// them from the clock, the others from samples at the timer's ticks.
func parseCPUUse(data []byte) (cpuUse, error) {
	var u cpuUse
	found := 0
	for line := range bytes.Lines(data) {
		f := strings.Fields(string(line))
		if len(f) == 0 {
			continue
		}
		switch {
		case f[0] == "cpu" && len(f) > 5:
			for _, s := range f[4:6] { // idle, iowait
				v, err := strconv.ParseUint(s, 10, 64)
				if err != nil {
					return u, fmt.Errorf("parse /proc/stat: %w", err)
				}
				u.idle += time.Duration(v) * userTick
			}
			found++
		case f[0] == "ctxt" && len(f) > 1:
			v, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return u, fmt.Errorf("parse /proc/stat: %w", err)
			}
			u.switches = v
			found++
		}
	}
	if found != 2 {
		return u, fmt.Errorf("parse /proc/stat: cpu or ctxt is missing")
	}
	return u, nil
}

// busy is the time that the CPUs were not idle between two moments.
func busy(from, to cpuUse, cpus int) time.Duration {
	return to.at.Sub(from.at)*time.Duration(cpus) - (to.idle - from.idle)
}

// taskUse is what the threads of a process have used since their start.
type taskUse struct {
	threads []int         // ids
	run     time.Duration // on a CPU, exact: the scheduler's account
	sleeps  uint64        // voluntary context switches
}

// readTaskUse sums over the threads that live now: those of a server do until
// its end. A pid of 0 is no process and has used nothing.
func readTaskUse(pid int) (taskUse, error) {
	var u taskUse
	if pid == 0 {
		return u, nil
	}
	dirs, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(dirs) == 0 {
		return u, fmt.Errorf("process %d is gone", pid)
	}
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "schedstat"))
		if err != nil {
			continue // the thread ended meanwhile
		}
		run, _, _ := strings.Cut(string(stat), " ")
		ns, err := strconv.ParseInt(run, 10, 64)
		if err != nil {
			return u, fmt.Errorf("parse %s/schedstat: %w", dir, err)
		}
		u.run += time.Duration(ns)
		n, err := readStatus(filepath.Join(dir, "status"), "voluntary_ctxt_switches")
		if err != nil {
			return u, err
		}
		u.sleeps += n
		id, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return u, err
		}
		u.threads = append(u.threads, id)
	}
	return u, nil
}

// residentMemory is VmRSS of a process in bytes.
func residentMemory(pid int) (uint64, error) {
	kib, err := readStatus(fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
	return kib << 10, err
}

// readStatus is a number of /proc/PID/status, without its unit.
func readStatus(path, field string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	s := bufio.NewScanner(bytes.NewReader(data))
	for s.Scan() {
		name, value, _ := strings.Cut(s.Text(), ":")
		if f := strings.Fields(value); name == field && len(f) > 0 {
			return strconv.ParseUint(f[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s: no %s", path, field)
}

// transferred is how many bytes a disk has read and written.
func transferred(disk string) (uint64, error) {
	data, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	if err != nil {
		return 0, err
	}
	return parseTransferred(data)
}

// parseTransferred reads /sys/block/DISK/stat (Documentation/block/stat.rst).
func parseTransferred(data []byte) (uint64, error) {
	const readSectors, writeSectors = 2, 6
	f := strings.Fields(string(data))
	if len(f) <= writeSectors {
		return 0, fmt.Errorf("parse disk statistics: %d fields", len(f))
	}
	var sum uint64
	for _, i := range []int{readSectors, writeSectors} {
		v, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse disk statistics: %w", err)
		}
		sum += v
	}
	return sum << block.SectorShift, nil
}
