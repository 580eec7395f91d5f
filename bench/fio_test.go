package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// report is what fio 3.33 prints, shortened.
const report = `fio: this is a warning
{
  "fio version" : "fio-3.33",
  "jobs" : [
    {
      "jobname" : "4k-randread-qd32",
      "groupid" : 0,
      "error" : 0,
      "read" : {
        "iops" : 6922.743923,
        "runtime" : 3003,
        "total_ios" : 20789,
        "clat_ns" : { "mean" : 4592138.4, "percentile" : { "50.000000" : 3686400, "99.000000" : 8093696 } }
      },
      "write" : { "iops" : 0.0, "total_ios" : 0, "clat_ns" : { "mean" : 0.0 } }
    }
  ]
}
`

func TestParseFio(t *testing.T) {
	got, err := parseFio([]byte(report))
	want := fioResult{iops: 6922.743923, p50: 3686400, p99: 8093696}
	if err != nil || got != want {
		t.Errorf("parseFio = %+v, %v, want %+v", got, err, want)
	}
	written := strings.NewReplacer(`"read"`, `"write"`, `"write"`, `"read"`).Replace(report)
	if got, err := parseFio([]byte(written)); err != nil || got != want {
		t.Errorf("parseFio of writes = %+v, %v, want %+v", got, err, want)
	}
}

func TestParseFioRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"nothing":    "",
		"no JSON":    "fio: cannot open\n",
		"cut":        report[:len(report)/2],
		"failed job": strings.Replace(report, `"error" : 0`, `"error" : 5`, 1),
		"no I/O":     strings.Replace(report, `"total_ios" : 20789`, `"total_ios" : 0`, 1),
		"no jobs":    `{"jobs": []}`,
	} {
		if got, err := parseFio([]byte(in)); err == nil {
			t.Errorf("%s: parseFio = %+v, want an error", name, got)
		}
	}
}

func TestArguments(t *testing.T) {
	w, err := workloadNamed("4k-randread-qd32-percpu")
	if err != nil {
		t.Fatal(err)
	}
	args := w.arguments("/dev/x", 4, time.Second, 1500*time.Millisecond)
	for _, want := range []string{"--filename=/dev/x", "--bs=4096", "--iodepth=32", "--numjobs=4", "--cpus_allowed=0-3",
		"--ramp_time=1000ms", "--runtime=1500ms", "--direct=1"} {
		if !slices.Contains(args, want) {
			t.Errorf("%s is missing in %v", want, args)
		}
	}
	if _, err := workloadNamed("4k"); err == nil {
		t.Error("an unknown workload was found")
	}
	if !slices.Contains(workloadNames(), syscallLoad) {
		t.Errorf("no workload %s", syscallLoad)
	}
}
