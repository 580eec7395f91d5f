package main

import "time"

// plan is what the guest is to do. The host hands it over as JSON.
type plan struct {
	CPUs, Queues int
	Rounds       int
	SizeMiB      int
	Devices      int // namespaces; the first one is under load
	Ramp         time.Duration
	Runtime      time.Duration
	Idle         time.Duration // 0 = do not watch idle servers
	Syscalls     bool
	HoldClock    bool // see clockHolder
	Workloads    []string
	Paths        []string
	Ours         string // absolute path of the ublk-nvmeof program
	Lab          string // absolute path of e2e/lab.sh
}

// anywhere is the plan without what is of one checkout, for the record.
func (p plan) anywhere() plan {
	p.Ours, p.Lab = "", ""
	return p
}

// event is one line of the guest's output; one of the fields is set.
type event struct {
	Guest   *guestInfo  `json:"guest,omitempty"`
	Sample  *sample     `json:"sample,omitempty"`
	Server  *serverInfo `json:"server,omitempty"`
	Failure *failure    `json:"failure,omitempty"`
	Done    bool        `json:"done,omitempty"` // the last event of a complete run
}

// guestInfo is what only the guest knows of the environment.
type guestInfo struct {
	Kernel string `json:"kernel"` // release
	Fio    string `json:"fio"`
	Nvme   string `json:"nvme_cli"`
}

// sample is one run of fio. All but latencies was counted by the kernel in a
// window within fio's measured time, so that fio's own start and end do not
// count. fio's IOPS are kept beside: they add up those of its jobs, even if one
// of them ran while another had ended.
type sample struct {
	Round    int     `json:"round"` // from 1
	Workload string  `json:"workload"`
	Path     string  `json:"path"`
	IOs      uint64  `json:"ios"`
	IOPS     float64 `json:"iops"`
	FioIOPS  float64 `json:"fio_iops"`
	P50      float64 `json:"p50_ns"` // completion latency
	P99      float64 `json:"p99_ns"`
	P999     float64 `json:"p999_ns"`

	// CPUPerIO is the time in which a CPU was not idle, summed over all CPUs,
	// in nanoseconds. In mode icount the CPUs take turns on one clock, so that a
	// CPU that waits for its turn counts as busy.
	CPUPerIO      float64 `json:"cpu_ns_per_io"`
	ServerPerIO   float64 `json:"server_ns_per_io"` // of it, the server process; 0 for the kernel
	SwitchesPerIO float64 `json:"switches_per_io"`  // context switches, all CPUs
	SleepsPerIO   float64 `json:"sleeps_per_io"`    // of the server's threads
	// IdlePercent is what the servers of the other paths used meanwhile, in
	// per cent of one CPU.
	IdlePercent float64 `json:"idle_percent"`
}

// serverInfo is what was seen of a server process outside of the rounds.
type serverInfo struct {
	Path    string `json:"path"`
	Threads int    `json:"threads,omitempty"`
	RSS     uint64 `json:"rss_bytes,omitempty"` // after a run with load
	// SyscallsPerIO of all threads by name, counted by the trace point
	// raw_syscalls:sys_enter in a run of SyscallLoad.
	SyscallsPerIO map[string]float64 `json:"syscalls_per_io,omitempty"`
	SyscallLoad   string             `json:"syscall_load,omitempty"`
	// IdlePercent of one CPU, device up and unused.
	IdlePercent *float64 `json:"idle_percent,omitempty"`
}

// failure is something that could not be measured.
type failure struct {
	Path  string `json:"path"`
	Where string `json:"where"`
	Error string `json:"error"`
}

// result is one run of a VM with all it gave.
type result struct {
	Env      environment  `json:"environment"`
	Samples  []sample     `json:"samples"`
	Servers  []serverInfo `json:"servers"`
	Failures []failure    `json:"failures,omitempty"`
}

// environment is what a reader of the result needs to judge it.
type environment struct {
	Date    time.Time `json:"date"`
	Mode    string    `json:"mode"`
	Series  string    `json:"series"` // of the kernel
	Label   string    `json:"label,omitempty"`
	Commit  string    `json:"commit"`
	Command string    `json:"flags"`
	Go      string    `json:"go"`
	QEMU    string    `json:"qemu"`
	Host    string    `json:"host"` // CPU and their number
	MTU     int       `json:"mtu"`
	Plan    plan      `json:"plan"`
	Guest   guestInfo `json:"guest"`
}
