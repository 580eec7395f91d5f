package e2e

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// commands are the scripts' own, beside those of testscript.
var commands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"exits":   exits,
	"until":   until,
	"verify":  verify,
	"waitfor": waitfor,
}

// exits CODE command [argument …]: the command's exit code is CODE. Its output is
// there for stdout and stderr.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code command [argument ...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
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
