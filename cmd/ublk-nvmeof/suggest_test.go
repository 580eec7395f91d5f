package main

import (
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// A verb or a flag that does not exist is named as such, whatever else is wrong,
// with the one that was probably meant.
func TestUnknownVerbsAndFlags(t *testing.T) {
	for args, want := range map[string]string{
		"dim -t rdma -a 10.0.0.1":      `unknown command "dim" for "ublk-nvmeof"; want one of ana-log, check-dhchap-key, completion, `,
		"--run-dir /x connect-al -q y": `unknown command "connect-al" for "ublk-nvmeof"; did you mean "connect-all"?`,
		"discovery -a 10.0.0.1":        `unknown command "discovery" for "ublk-nvmeof"; did you mean "discover"?`,
		"lst --json":                   `unknown command "lst" for "ublk-nvmeof"; did you mean "list"?`,
		"format /dev/nvme0":            `unknown command "format" for "ublk-nvmeof"; want one of ana-log, check-dhchap-key, completion, `,
		"target grnat -q":              `unknown command "grnat" for "ublk-nvmeof target"; did you mean "grant"?`,
		"target namespace rezise 1 1G": `unknown command "rezise" for "ublk-nvmeof target namespace"; did you mean "resize"?`,
		"connect --nqm x":              `connect: unknown flag: --nqm; did you mean "--nqn"?`,
		"connect --nr-io-queue=3":      `connect: unknown flag: --nr-io-queue; did you mean "--nr-io-queues"?`,
		"connect --hdr-digest":         `connect: -g/--hdr-digest: only NVMe/TCP has this flag`,
		"connect -A 10.0.0.1":          `connect: unknown flag: -A; did you mean "-a"?`,
		"connect --host 10.0.0.1":      `connect: unknown flag: --host` + "\n", // not --tos
		"connect --addr 10.0.0.1":      `connect: unknown flag: --addr` + "\n",
		"start":                        `unknown command "start" for "ublk-nvmeof"; want one of `, // not target
		"connect -g":                   `connect: -g/--hdr-digest: only NVMe/TCP has this flag`,
		"-a 10.0.0.1 -n nqn.x":         `unknown flag: -a; the flags of a command follow its name, see ublk-nvmeof --help`,
		"disconnect --froce -n x":      `disconnect: unknown flag: --froce; did you mean "--force"?`,
		"serv --report-fd=3":           `unknown command "serv"`, // serve is hidden
		"target fault drop --nsid 3":   `target fault: unknown flag: --nsid`,
	} {
		stdout, stderr, code := program(t, strings.Fields(args)...)
		if code != exit.Usage || stdout != "" || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q %q, want %q", args, code, stdout, stderr, want)
		}
	}
	for _, args := range []string{"help", "help connect", "completion bash", "__complete con", "--help", "target --help", "-h"} {
		if _, stderr, code := program(t, strings.Fields(args)...); code != exit.OK {
			t.Errorf("%s: exit code %d, %q", args, code, stderr)
		}
	}
}

func TestEdits(t *testing.T) {
	for words, want := range map[string]int{
		"/": 0, "a/": 1, "/abc": 3, "abc/abc": 0, "abc/ABC": 0, "list/lst": 1, "froce/force": 1, "rezise/resize": 2, "ca/abc": 3, "discover/disconnect": 4, "kitten/sitting": 3, "ü/u": 1,
	} {
		a, b, _ := strings.Cut(words, "/")
		if got := edits(a, b); got != want {
			t.Errorf("%q and %q: %d, want %d", a, b, got, want)
		}
	}
}

// TestRootFor: a verb that is made alone is the same as among all others.
func TestRootFor(t *testing.T) {
	for _, name := range []string{"connect", "serve", "udev", "disconnect"} {
		alone := rootFor([]string{name, "--help"})
		if all := alone.Commands(); len(all) != 1 || all[0].Name() != name {
			t.Fatalf("%s: %v", name, all)
		}
		among, _, err := newRoot().Find([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := alone.Commands()[0].UsageString(), among.UsageString(); got != want {
			t.Errorf("%s: usage\n%s\nwant\n%s", name, got, want)
		}
	}
	for _, args := range [][]string{nil, {"--help"}, {"--run-dir", "/x", "connect"}, {"help", "connect"}, {"conect"}} {
		if n := len(rootFor(args).Commands()); n < 30 {
			t.Errorf("%q: %d verbs", args, n)
		}
	}
}
