package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// workload is one fio job.
type workload struct {
	name   string
	rw     string
	block  int // bytes
	depth  int
	perCPU bool // one job per CPU, bound to it; otherwise one job
}

var workloads = []workload{
	{name: "4k-randread-qd1", rw: "randread", block: 4 << 10, depth: 1},
	{name: "4k-randread-qd32", rw: "randread", block: 4 << 10, depth: 32},
	{name: "4k-randwrite-qd32", rw: "randwrite", block: 4 << 10, depth: 32},
	{name: "128k-read-qd8", rw: "read", block: 128 << 10, depth: 8},
	{name: "128k-write-qd8", rw: "write", block: 128 << 10, depth: 8},
	{name: "4k-randread-qd32-percpu", rw: "randread", block: 4 << 10, depth: 32, perCPU: true},
}

// syscallLoad is the workload under which system calls are counted.
const syscallLoad = "4k-randread-qd32"

func workloadNames() []string {
	var names []string
	for _, w := range workloads {
		names = append(names, w.name)
	}
	return names
}

func workloadNamed(name string) (workload, error) {
	i := slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })
	if i < 0 {
		return workload{}, fmt.Errorf("no workload %q", name)
	}
	return workloads[i], nil
}

// arguments are fio's.
func (w workload) arguments(disk string, cpus int, ramp, runtime time.Duration) []string {
	args := []string{
		"--name=" + w.name, "--filename=" + disk, "--rw=" + w.rw, "--bs=" + strconv.Itoa(w.block),
		"--iodepth=" + strconv.Itoa(w.depth), "--ioengine=io_uring", "--direct=1",
		"--time_based", "--ramp_time=" + milliseconds(ramp), "--runtime=" + milliseconds(runtime),
		"--group_reporting", "--output-format=json",
	}
	if w.perCPU {
		args = append(args, "--numjobs="+strconv.Itoa(cpus), "--cpus_allowed=0-"+strconv.Itoa(cpus-1),
			"--cpus_allowed_policy=split")
	}
	return args
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) + "ms" }

// fioResult is what is used of fio's report of one job group.
type fioResult struct {
	iops           float64
	p50, p99, p999 float64 // nanoseconds, completion latency
}

// parseFio reads fio's JSON, which may follow lines of warnings.
func parseFio(out []byte) (fioResult, error) {
	type direction struct {
		IOs  uint64  `json:"total_ios"`
		IOPS float64 `json:"iops"`
		Clat struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Name  string    `json:"jobname"`
			Error int       `json:"error"`
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	start := bytes.IndexByte(out, '{')
	if start < 0 {
		return fioResult{}, errors.New("parse fio report: no JSON")
	}
	if err := json.Unmarshal(out[start:], &report); err != nil {
		return fioResult{}, fmt.Errorf("parse fio report: %w", err)
	}
	if len(report.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("parse fio report: %d jobs, want 1 group", len(report.Jobs))
	}
	job := report.Jobs[0]
	if job.Error != 0 {
		return fioResult{}, fmt.Errorf("fio job %s: error %d", job.Name, job.Error)
	}
	d := job.Read
	if d.IOs == 0 {
		d = job.Write
	}
	if d.IOs == 0 || d.IOPS <= 0 {
		return fioResult{}, fmt.Errorf("fio job %s: no I/O was done", job.Name)
	}
	return fioResult{
		iops: d.IOPS, p50: d.Clat.Percentile["50.000000"],
		p99: d.Clat.Percentile["99.000000"], p999: d.Clat.Percentile["99.900000"],
	}, nil
}
