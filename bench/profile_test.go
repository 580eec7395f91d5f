package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestStageOf(t *testing.T) {
	for function, want := range map[string]string{
		"go:ublk-nvmeof/poller.(*Loop).pass": "ours: Go",
		"rep_movs_alternative":               "copy to or from memory of programs",
		"rxe_requester [rdma_rxe]":           "rdma_rxe, both ends",
		"ublk_queue_rq [ublk_drv]":           "ublk_drv",
		"nvme_rdma_queue_rq [nvme_rdma]":     "nvme-rdma",
		"nvmet_bdev_execute_rw [nvmet]":      "target: nvmet, null_blk",
		"io_submit_sqes":                     "io_uring",
		"__schedule":                         "scheduler and timers",
		"ib_uverbs_write [ib_uverbs]":        "verbs and RDMA core",
		"kfree":                              "the rest of the kernel",
		"libraries and fio":                  "libraries and fio",
	} {
		if got := stageOf(function); got != want {
			t.Errorf("%s: %q, want %q", function, got, want)
		}
	}
}

// TestProfileMarkdown counts from one mark to the next, in functions that begin before a block.
func TestProfileMarkdown(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"w.ours.1": "401000 100\nffffffff81000010 50\n",
		"w.ours.2": "401000 300\n401020 200\nffffffff81000010 1050\n7fff00001000 700\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := &symbols{
		addresses: []uint64{0x400ff0, programCode, 0xffffffff81000000},
		names:     []string{"go:main.work", "libraries and fio", "__schedule"},
	}
	loads, err := countLoads(dir, []string{"v", "w"}, []profile{{Workload: "w", Path: "ours", From: "w.ours.1", To: "w.ours.2", IOs: 10}}, s)
	if err != nil {
		t.Fatal(err)
	}
	text := profileMarkdown(environment{Series: "7.3", Date: time.Unix(0, 0).UTC()}, loads, 2)
	for _, want := range []string{"| scheduler and timers | 100 |", "| ours: Go | 40 |", "| libraries and fio | 70 |", "| sum | 210 |", "| __schedule | 100 |"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, "go:main.work") {
		t.Errorf("a third function in\n%s", text)
	}
	wellFormed(t, stagesSVG(bars(loads)))
}
