package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// commands are the scripts' own, beside those of testscript.
var commands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"exits":    exits,
	"failover": failover,
	"fields":   fields,
	"longest":  longest,
	"refuses":  refuses,
	"shares":   shares,
	"until":    until,
	"verify":   verify,
	"waitfor":  waitfor,
	"within":   within,
}

// exits CODE command [argument …]: the command's exit code is CODE. Its output is
// there for stdout and stderr.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code command [argument ...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := exitCode(ts, args[1:]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// exitCode runs a command.
func exitCode(ts *testscript.TestScript, command []string) int {
	err := ts.Exec(command[0], command[1:]...)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	ts.Check(err)
	return 0
}

// refuses CODE PATTERN command [argument …]: the command ends with that exit
// code, says why in the one line on standard error, which matches the regular
// expression, and leaves nothing behind.
func refuses(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: refuses code pattern command [argument ...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	pattern, err := regexp.Compile(args[1])
	ts.Check(err)
	before := remains(ts)
	if got := exitCode(ts, args[2:]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
	said := ts.ReadFile("stderr")
	line, rest, complete := strings.Cut(said, "\n")
	if !complete || rest != "" || !pattern.MatchString(line) {
		ts.Fatalf("standard error is %q, want one line like %q", said, args[1])
	}
	if left := remaining(ts, before); len(left) > 0 {
		ts.Fatalf("left behind: %q", left)
	}
}

// longest DURATION FILE: no I/O of a fio run failed or took longer, by its JSON
// output.
func longest(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: longest duration file")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	type direction struct {
		Latency struct {
			Max int64 `json:"max"`
		} `json:"clat_ns"`
		Requests int `json:"total_ios"`
	}
	var out struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write direction
		}
	}
	text := ts.ReadFile(args[1])
	ts.Check(json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &out))
	var took time.Duration
	n := 0
	for _, j := range out.Jobs {
		if j.Error != 0 {
			ts.Fatalf("fio: %v", syscall.Errno(j.Error))
		}
		took = max(took, time.Duration(j.Read.Latency.Max), time.Duration(j.Write.Latency.Max))
		n += j.Read.Requests + j.Write.Requests
	}
	if n == 0 || took > limit {
		ts.Fatalf("longest of %d requests took %v, want at most %v", n, took, limit)
	}
	// Of interest when nothing failed, too.
	fmt.Fprintf(os.Stderr, "    longest of %d requests took %v\n", n, took.Round(time.Millisecond))
}

// within DURATION command [argument …]: the command succeeds, and not later.
func within(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: within duration command [argument ...]")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	start := time.Now()
	ts.Check(ts.Exec(args[1], args[2:]...))
	took := time.Since(start).Round(time.Millisecond)
	if took > limit {
		ts.Fatalf("took %v, want at most %v", took, limit)
	}
	ts.Logf("took %v", took)
}

// until PATTERN command [argument …]: the command is run again and again until its
// output matches, for 30 s at most.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until pattern command [argument ...]")
	}
	pattern, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var out []byte
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if out, err = exec.Command(args[1], args[2:]...).CombinedOutput(); err == nil && pattern.Match(out) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	ts.Fatalf("no match for %s; last: %v\n%s", args[0], err, out)
}

// verify DEVICE [fio option …]: writes and reads at random, 512 bytes to 1 MiB,
// 32 requests in flight, then reads everything back and compares by checksum.
// Options come after the command's own and replace them.
func verify(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: verify device [fio option ...]")
	}
	// Without randrepeat=0 a second run writes what the first one has left, and
	// sees no lost write. Without serialize_overlap the last of two overlapping
	// writes in flight would be anybody's guess.
	ts.Check(ts.Exec("fio", append([]string{
		"--name=verify", "--filename=" + args[0], "--ioengine=io_uring", "--direct=1", "--iodepth=32",
		"--rw=randrw", "--bsrange=512-1m", "--size=32m", "--randrepeat=0", "--serialize_overlap=1",
		"--verify=crc32c", "--verify_fatal=1", "--verify_dump=0",
	}, args[1:]...)...))
	var speeds []string
	for _, line := range strings.Split(ts.ReadFile("stdout"), "\n") {
		if kind, rest, ok := strings.Cut(line, ": bw="); ok {
			speed, _, _ := strings.Cut(rest, " ")
			speeds = append(speeds, strings.ToLower(strings.TrimSpace(kind))+" "+speed)
		}
	}
	fmt.Fprintf(os.Stderr, "    verify %s: %s\n", strings.Join(args, " "), strings.Join(speeds, ", "))
}

// waitfor [-t DURATION] FILE [PATTERN]: the file exists, and a line of it matches
// the regular expression, within 10 s or what -t says. "! waitfor FILE" waits for
// it to go.
func waitfor(ts *testscript.TestScript, neg bool, args []string) {
	limit := 10 * time.Second
	if len(args) > 2 && args[0] == "-t" {
		var err error
		limit, err = time.ParseDuration(args[1])
		ts.Check(err)
		args = args[2:]
	}
	if len(args) < 1 || len(args) > 2 || neg && len(args) == 2 {
		ts.Fatalf("usage: waitfor [-t duration] file [pattern], or ! waitfor [-t duration] file")
	}
	file := ts.MkAbs(args[0])
	there := func() bool {
		_, err := os.Stat(file)
		return err == nil
	}
	if len(args) == 2 {
		pattern, err := regexp.Compile("(?m)" + args[1])
		ts.Check(err)
		there = func() bool {
			text, err := os.ReadFile(file)
			return err == nil && pattern.Match(text)
		}
	}
	// sysfs and devtmpfs tell nobody of their files' changes.
	for end := time.Now().Add(limit); there() == neg; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			ts.Fatalf("%s: not so after %v", file, limit)
		}
	}
}
