package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/process"
)

// TestMain lets the test be the program that it tests, because connect executes
// its own file.
func TestMain(m *testing.M) {
	const sharedDir = "UBLK_NVMEOF_TEST_SHARED"
	sharedDirs = func() state.Host { return state.Host{os.Getenv(sharedDir)} }
	if os.Getenv("UBLK_NVMEOF_TEST_MAIN") != "" || len(os.Args) > 1 && os.Args[1] == "serve" {
		main()
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "")
		if err == nil {
			err = os.Setenv(sharedDir, dir)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		return m.Run()
	}())
}

// program runs the program with args, in this process.
func program(t *testing.T, args ...string) (stdout, stderr string, code exit.Code) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(args, &out, &errs)
	return out.String(), errs.String(), code
}

// execProgram runs the program with args in a process of its own.
func execProgram(t *testing.T, args ...string) (stdout, stderr string, code exit.Code) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), self(), args...)
	// The race detector would make each process last a second longer.
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), exit.Code(cmd.ProcessState.ExitCode())
}

// runDir is a run directory whose sockets have names that are short enough.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestUsage(t *testing.T) {
	dir := runDir(t)
	for _, tt := range []struct {
		args string
		want string
	}{
		{"", "no verb is given; see ublk-nvmeof --help"},
		{"attach", `unknown command "attach" for "ublk-nvmeof"`},
		{"connect extra", `connect: "extra": want no argument`},
		{"connect -a 10.0.2.15 -n nqn.x -Q 8", `connect: -Q/--queue-size "8": want a number, 16 to 1024`},
		{"connect -a 10.0.2.15 -n nqn.x -i 0", `connect: -i/--nr-io-queues "0": want a number, 1 to 65535`},
		{"connect -a 10.0.2.15 -n nqn.x -o yaml", `connect: -o/--output-format "yaml": want normal or json`},
		{"connect -a 10.0.2.15 -n nqn.x --foreground=si", `connect: --foreground "si": want true or false`},
		{"connect -a 10.0.2.15 -n nqn.x --tls", "connect: --tls: only NVMe/TCP has this flag"},
		{"connect -a 10.0.2.15 -n nqn.x --devid-file /nonexistent/x", `connect: --devid-file "/nonexistent/x": want a file in a directory that exists`},
		{"connect -a 10.0.2.15 -n nqn.x -f eth99", `connect: -f/--host-iface "eth99": there is no such interface; want one of `},
		{"connect -a 10.0.2.15 -n nqn.x --fast_io_fail_tmo=off", `connect: -F/--fast-io-fail-tmo "off": want seconds`},
		{"connect -a 10.0.2.15 -n nqn.x --tls_key=1", "connect: --tls-key: only NVMe/TCP has this flag"},
		{"connect -a 10.0.2.15 -n nqn.x --owner=", `connect: --owner "": want 1 to 255 printable characters`},
		{"connect -a 10.0.2.15", "connect: -n/--nqn: no value is given; want the name of the subsystem"},
		{"connect -n nqn.x", "connect: -a/--traddr: no value is given; want the address of the target"},
		{"connect -n", "connect: -n/--nqn: no value is given; want the name of an I/O subsystem"},
		{"connect -a 10.0.2.15 -n nqn.x --metrics-listen 9471", `connect: --metrics-listen "9471": want HOST:PORT, or :PORT for the loopback address`},
		{"connect -a 10.0.2.15 -n nqn.x --metrics-listen :0", `connect: --metrics-listen ":0": want HOST:PORT`},
		{"connect -a 10.0.2.15 -n nqn.x --metrics-listen 1.2.3:9471", `connect: --metrics-listen "1.2.3:9471": want HOST:PORT`},
		{"metrics extra", `metrics: "extra": want no argument`},
		{"top -o x", `top: -o/--output-format "x": want normal or json`},
		{"top --interval 1ms", `top: --interval "1ms": want seconds, or a time like 1m30s, 100ms to 1h0m0s`},
		{"top --count -1", `top: --count "-1": want a number, 0 to`},
		{"disconnect", "disconnect: nothing is given; want -n NQN or -d DEVICE"},
		{"disconnect --force=x -n y", `disconnect: --force "x": want true or false`},
		{"discover -a 10.0.2.15 -r /tmp/x", `discover: -r/--raw "/tmp/x": this is not supported; want -o json, which has all fields`},
		{"discover -t tcp -a 10.0.2.15", `discover: -t/--transport "tcp": want rdma`},
		{"connect-all -a 10.0.2.15 --device-id 3", "connect-all: unknown flag: --device-id"},
		{"disconnect-all -r tcp", `disconnect-all: -r/--transport "tcp": want rdma`},
		{"target --referral host", `target: --referral "host": want ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT`},
		{"target referral add 0.0.0.0", `target referral add: referral "0.0.0.0": want ADDRESS`},
		{"list extra", `list: "extra": want no argument`},
		{"--run-dir", "--run-dir: no value is given; want DIRECTORY"},
		{"connect -w ::", `connect: -w/--host-traddr "::": the unspecified address is not the address of a host; want`},
		{"connect --max-io-size 1", `connect: --max-io-size "1": that is 1 byte; want a size`},
		{"connect --memory-limit 0", `connect: --memory-limit "0": want a size like 64MiB, up to 1PiB`},
		{"target drop --qid x", `target drop: --qid "x": want a whole number`},
		{"target grant 0", `target grant: queues "0": want a number, 1 to 65535, or none`},
		{"target refuse x", `target refuse: status="x": want a number, 1 to 2047, or off`},
		{"upgrade", "upgrade: no argument is given; want {NQN | DEVICE}…"},
		{"recover", "recover: want --all, or the NQN of a subsystem, a device or the name of a server"},
		{"target stop --target", "target stop: --target: no value is given; want NAME"},
		{"target grant", "target grant: no argument is given; want {N | none}"},
		{"target ana 1", "target ana: STATE is missing; want GROUP STATE"},
		{"target namespace read-only 1", "target namespace read-only: {on | off} is missing; want NSID {on | off}"},
		{"target namespace resize 1 1GiB 2", `target namespace resize: "2" is one argument too many; want NSID [SIZE]`},
		{"target clear 1 2", `target clear: "2" is one argument too many; want [FAULT]`},
		{"target drop 3", `target drop: "3": want no argument`},
		{"list -o x", `list: -o/--output-format "x": want normal or json`},
		{"target", "target: -n/--nqn: no value is given; want the name of a subsystem"},
		{"target --namespace ram=1MiB", `--namespace applies to the subsystem of the --nqn before it`},
		{"target -n nqn.x --namespace ram=none", `target: --namespace "ram=none": "none": want a size like 64MiB; want ram=SIZE`},
		{"target -n nqn.x --in-capsule-size 5", `target: --in-capsule-size "5": that is 5 bytes; want 0, or a size like 64KiB`},
		{"target -n nqn.x --max-io-size 12KiB", `target: --max-io-size "12KiB": want a power of two`},
		{"target -n nqn.x --max-queues 0", `target: --max-queues "0": want a number, 1 to 65535`},
		{"target -n nqn.x --fault opcode=read", `target: --fault "opcode=read": the fault does nothing; want delay=TIME`},
		{"target grant x", `target grant: queues "x": want a number, 1 to 65535`},
		{"target fault drop,opcode=identify", `target fault: fault "drop,opcode=identify": opcode "identify" is unknown; want a number or compare`},
		{"target namespace read-only 1 yes", `target namespace read-only: "yes": want on or off`},
		{"target ana 1 bad", `target ana: ANA state "bad": want change, inaccessible`},
		{"target reject 10", `target reject: status "10": want a number, 1 to 9`},
		{"target refuse 0", `target refuse: status="0": want a number, 1 to 2047`},
		{"version -o x", `version: -o/--output-format "x": want normal or json`},
	} {
		stdout, stderr, code := program(t, append([]string{"--run-dir=" + dir + "/none"}, strings.Fields(tt.args)...)...)
		if code != exit.Usage || stdout != "" || !strings.HasPrefix(stderr, "ublk-nvmeof: ") ||
			!strings.Contains(stderr, tt.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q, want %q", tt.args, code, stdout, stderr, tt.want)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("something happened: %v", left)
	}
}

// An empty path, as of a variable that is not set, is not the working directory.
func TestEmptyRunDirectory(t *testing.T) {
	for _, args := range []string{"list", "gc", "target list", "connect -a 127.0.0.1 -n nqn.x", "disconnect nqn.x"} {
		_, stderr, code := program(t, append(strings.Fields(args), "--run-dir=")...)
		if code != exit.Usage || !strings.HasSuffix(stderr, ": --run-dir: no path is given; want DIRECTORY\n") {
			t.Errorf("%s: exit code %d, %q", args, code, stderr)
		}
	}
}

func TestHelpHasTheExitCodes(t *testing.T) {
	stdout, stderr, code := program(t, "--help")
	if code != exit.OK || stderr != "" || !strings.Contains(stdout, exit.Table()) {
		t.Errorf("exit code %d, stderr %q, stdout:\n%s", code, stderr, stdout)
	}
	if strings.Contains(stdout, "\n  serve ") {
		t.Error("serve is shown")
	}
	for _, verb := range []string{"", "connect", "disconnect", "list", "recover", "upgrade", "gc", "target", "target list", "target namespace add"} {
		help, _, _ := program(t, append(strings.Fields(verb), "--help")...)
		if !strings.Contains(help, "--run-dir DIRECTORY") || !strings.Contains(help, "$XDG_RUNTIME_DIR") {
			t.Errorf("help of %q does not show --run-dir:\n%s", verb, help)
		}
	}
	for _, verb := range []string{"connect", "connect-all", "discover", "disconnect", "disconnect-all", "list", "metrics", "top", "target", "version", "completion"} {
		if !strings.Contains(stdout, "\n  "+verb+" ") {
			t.Errorf("%s is missing", verb)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, spelling := range []string{"version", "--version", "-V"} {
		stdout, _, code := program(t, spelling)
		if code != exit.OK || !strings.HasPrefix(stdout, "ublk-nvmeof ") || !strings.Contains(stdout, " go1.") {
			t.Errorf("%s: exit code %d, %q", spelling, code, stdout)
		}
	}
	stdout, _, code := program(t, "version", "-o", "json")
	var b output.Build
	if err := json.Unmarshal([]byte(stdout), &b); err != nil || code != exit.OK || b.SchemaVersion != output.SchemaVersion || b.Version == "" {
		t.Errorf("exit code %d, %q, %v", code, stdout, err)
	}
}

// A server that fails hands its code and its line through connect. Here it
// fails at the first thing it does, on every machine.
func TestServerFailure(t *testing.T) {
	file := filepath.Join(runDir(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, more := range []string{"--foreground=false", "--foreground"} {
		stdout, stderr, code := execProgram(t, "connect", "--run-dir", file, "-a", "127.0.0.1", "-n", "nqn.x", more)
		if code != exit.Other || stdout != "" || strings.Count(stderr, "\n") != 1 ||
			!strings.HasPrefix(stderr, "ublk-nvmeof: connect: make run directory: ") {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", more, code, stdout, stderr)
		}
	}
}

// shell makes a server of a shell script.
func shell(script string) (path string, args []string) {
	return "/bin/sh", []string{"sh", "-c", script, "sh"}
}

// silent is for a launch that says nothing.
func silent(string) {}

func TestLaunch(t *testing.T) {
	path, args := shell(`echo '{"status": {"name": "ctrl9"}}' >&3; exec 3>&-; exit 0`)
	s, err := launch(t.Context(), path, args, nil, time.Minute, silent)
	if err != nil || s.Name != "ctrl9" {
		t.Errorf("%+v, %v", s, err)
	}
	path, args = shell(`echo '{"error": {"code": 8, "error": "no such subsystem"}}' >&3; exit 8`)
	if _, err := launch(t.Context(), path, args, nil, time.Minute, silent); exit.Of(err) != exit.UnknownSubsys || err.Error() != "no such subsystem" {
		t.Errorf("%v", err)
	}
	for _, script := range []string{"exit 3", "kill -9 $$", "echo nonsense >&3"} {
		path, args = shell(script)
		if _, err := launch(t.Context(), path, args, nil, time.Minute, silent); err == nil || !strings.HasPrefix(err.Error(), "the server died: ") {
			t.Errorf("%s: %v", script, err)
		}
	}
	if _, err := launch(t.Context(), "/nonexistent", nil, nil, time.Minute, silent); err == nil || !strings.HasPrefix(err.Error(), "start server: ") {
		t.Error(err)
	}
}

// The server has a session of its own, nothing of the caller's but standard
// error, and the root directory. It does not speak for the caller's service.
func TestServerIsOnItsOwn(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/nonexistent")
	path, args := shell(`sid=$(cut -d' ' -f6 /proc/$$/stat); out=$(readlink /proc/$$/fd/1)
printf '{"status": {"name": "%s", "frontend": "%s", "nqn": "x", "provider": "%s", "zero_copy": "%s"}}' "$(pwd)" "$out" "$([ $sid = $$ ] && echo leader)" "$NOTIFY_SOCKET" >&3`)
	s, err := launch(t.Context(), path, args, nil, time.Minute, silent)
	if err != nil || s.Name != "/" || s.Frontend != "/dev/null" || s.Provider != "leader" || s.ZeroCopy != "" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestLaunchGivesUp interrupts commands. A server that is not ready then gives up; one that is
// ready stays, and the command shows it.
func TestLaunchGivesUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path, args := shell(`read never <&3; echo '{"error": {"message": "interrupted"}}' >&3; exit 1`)
	if s, err := launch(ctx, path, args, nil, time.Minute, silent); err == nil {
		t.Errorf("not ready: %+v", s)
	}
	path, args = shell(`read never <&3; echo '{"status": {"name": "ctrl9"}}' >&3`)
	if s, err := launch(ctx, path, args, nil, time.Minute, silent); err != nil || s.Name != "ctrl9" {
		t.Errorf("ready: %+v, %v", s, err)
	}
}

func TestAwaitKills(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := await(t.Context(), make(chan report), cmd.Process, nil, -undoTime, silent); exit.Of(err) != exit.Timeout {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the server lives")
	}
}

// PR_SET_IO_FLUSHER is only for root, and set before the server is executed so
// that all its threads have it.
func TestIOFlusherPassesToPrograms(t *testing.T) {
	// The mark is the thread's, and main keeps to one. This one ends with the test.
	runtime.LockOSThread()
	testenv.Need(t, "root", process.SetIOFlusher())
	// A shell's threads are one; the flags are those of the process that this
	// thread starts.
	path, args := shell(`printf '{"status": {"cntlid": 1, "name": "%s"}}' "$(cut -d' ' -f9 /proc/$$/stat)" >&3`)
	s, err := launch(t.Context(), path, args, nil, time.Minute, silent)
	var flags uint64
	if err == nil {
		_, err = fmt.Sscan(s.Name, &flags)
	}
	const memallocNoIO = 0x80000 // PF_MEMALLOC_NOIO
	if err != nil || flags&memallocNoIO == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
}

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	// Standard output and error are replaced: not in this process.
	script := exec.CommandContext(t.Context(), self(), "-test.run=^TestHelperLog$")
	script.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_LOG="+path)
	if out, err := script.CombinedOutput(); err != nil || !strings.Contains(string(out), "before") || strings.Contains(string(out), "after") {
		t.Fatalf("%v\n%s", err, out)
	}
	now, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.Stat(path + ".1")
	if err != nil {
		t.Fatal(err)
	}
	if now.Size() > logLimit+1000 || old.Size() > logLimit+1000 || old.Size() <= logLimit || now.Mode().Perm() != 0o600 {
		t.Errorf("%v of %d bytes, before %d", now.Mode(), now.Size(), old.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.HasSuffix(string(text), "panic: to the log\n") {
		t.Errorf("%v: …%q", err, text[max(0, len(text)-100):])
	}
}

// TestHelperLog is the process whose log TestLogFile looks at.
func TestHelperLog(t *testing.T) {
	path := os.Getenv("UBLK_NVMEOF_TEST_LOG")
	if path == "" {
		return // only a helper
	}
	l := &logFile{}
	fmt.Fprintln(l, "before")
	if err := l.open(path); err != nil {
		t.Fatal(err)
	}
	line := "after " + strings.Repeat("x", 99) + "\n"
	for range (logLimit + logLimit/2) / len(line) {
		if _, err := io.WriteString(l, line); err != nil {
			t.Fatal(err)
		}
	}
	os.Stderr.WriteString("panic: to the log\n")
	os.Exit(0)
}

// fake is a server behind a control socket. It is this process as far as its
// record says, unless the record says that it is dead.
type fake struct {
	entry *state.Entry
	first chan struct{} // closed when it is asked for the first time

	mu    sync.Mutex // guards what follows
	code  exit.Code
	asked []bool // with force or not
	keys  control.Reauthentication
}

func (f *fake) refuse(c exit.Code) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.code = c
}

func (f *fake) askedFor() []bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *fake) Status() control.Status {
	return control.Status{
		SchemaVersion: control.SchemaVersion, Name: f.entry.Name, PID: os.Getpid(), State: "live", NQN: f.entry.Target.NQN,
		Transport: "rdma", TrAddr: "10.0.2.15", TrSvcID: "4420", Devices: []control.Device{{Device: "ublkb3", NSID: 1, Size: 1 << 20, BlockSize: 512}},
	}
}

func (f *fake) HandOver(context.Context, string) error { return nil }

func (f *fake) Query(_ context.Context, q control.Query) (control.QueryResult, error) {
	return control.QueryResult{Data: make([]byte, q.Length)}, nil
}

func (f *fake) Reserve(_ context.Context, r control.Reservation) ([]byte, error) { return r.Data, nil }

func (f *fake) Reset(context.Context) error { return nil }

func (f *fake) Rescan(context.Context) error { return nil }

func (f *fake) AddPath(context.Context, control.PathRequest) error { return nil }

func (f *fake) RemovePath(context.Context, control.PathRequest) error { return nil }

func (f *fake) SetPolicy(context.Context, control.PolicyRequest) error { return nil }
func (f *fake) Reauthenticate(_ context.Context, r control.Reauthentication) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = r
	return nil
}

func (f *fake) Disconnect(_ context.Context, force bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.asked = append(f.asked, force); len(f.asked) == 1 {
		close(f.first)
	}
	if f.code != exit.OK {
		return exit.Errorf(f.code, "told to fail")
	}
	return nil
}

// visible is what a run directory has, but for its own files.
func visible(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "[^.]*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// record puts a server into the run directory.
func record(t *testing.T, dir, nqn string, p state.Process, devices ...state.Device) *state.Entry {
	t.Helper()
	target := state.Target{Address: netip.MustParseAddrPort("10.0.2.15:4420"), NQN: nqn, HostNQN: "nqn.host"}
	e, err := state.Dir(dir).Reserve(t.Context(), target, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	e.Phase, e.Devices = state.Live, devices
	if p.PID != 0 {
		e.Process = p
	}
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	return e
}

func serveFake(t *testing.T, e *state.Entry) *fake {
	t.Helper()
	f := &fake{entry: e, first: make(chan struct{})}
	l, err := control.Listen(e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	s := control.NewServer(f, slog.New(slog.DiscardHandler))
	joined := make(chan error, 1)
	go func(l net.Listener) { joined <- s.Serve(l) }(l)
	t.Cleanup(func() {
		s.Close()
		<-joined
	})
	return f
}

// startProcess is another process, which records may name. kill ends it.
func startProcess(t *testing.T) (p state.Process, kill func()) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := state.Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	kill = func() {
		cmd.Process.Kill()
		<-ended
	}
	t.Cleanup(kill)
	return p, kill
}

func TestList(t *testing.T) {
	dir := runDir(t)
	serveFake(t, record(t, dir, "nqn.live", state.Process{}))
	dead, kill := startProcess(t)
	kill()
	record(t, dir, "nqn.dead", dead, state.Device{ID: 4, NSID: 2, Told: state.Told{Size: 1 << 20, BlockSize: 512}})
	record(t, dir, "nqn.silent", state.Process{}, state.Device{ID: 5, NSID: 3}) // no socket
	bad := record(t, dir, "nqn.bad", state.Process{})
	if err := os.WriteFile(filepath.Join(dir, bad.Name, "state.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := program(t, "list", "--run-dir", dir)
	if code != exit.OK || !strings.HasPrefix(stderr, "ublk-nvmeof: list: ctrl3: read ") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
	var rows [][]string
	for line := range strings.Lines(stdout) {
		rows = append(rows, strings.Fields(line))
	}
	if len(rows) != 5 ||
		rows[1][0] != "/dev/ublkb3" || rows[1][6] != "live" ||
		rows[2][0] != "/dev/ublkb4" || rows[2][1] != "2" || rows[2][2] != "1.0" || rows[2][6] != "lost" ||
		rows[3][0] != "/dev/ublkb5" || rows[3][5] != "unknown" ||
		rows[4][0] != "-" || rows[4][3] != "-" || rows[4][4] != "-" || rows[4][5] != "unknown" {
		t.Errorf("%s", stdout)
	}
	stdout, _, _ = program(t, "list", "--run-dir", dir, "-o", "json")
	var l struct {
		SchemaVersion int `json:"schema_version"`
		Devices       []struct{ DevicePath, State string }
		Controllers   []control.Status
	}
	if err := json.Unmarshal([]byte(stdout), &l); err != nil || l.SchemaVersion != 1 || len(l.Devices) != 3 || len(l.Controllers) != 4 {
		t.Errorf("%v\n%s", err, stdout)
	}
}

func TestUpgradeNobody(t *testing.T) {
	dir := runDir(t)
	record(t, dir, "nqn.a", state.Process{}, state.Device{ID: 3, NSID: 1}) // of a dead server
	for _, name := range []string{"ublkb9", "nqn.none"} {
		if stdout, stderr, code := program(t, "upgrade", "--run-dir", dir, name); code != exit.NotFound || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q %q", name, code, stdout, stderr)
		}
	}
}

func TestDisconnect(t *testing.T) {
	dir := runDir(t)
	run := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return program(t, append([]string{"disconnect", "--run-dir", dir}, args...)...)
	}
	if stdout, stderr, code := run("-n", "nqn.none"); code != exit.OK || stderr != "" || stdout != "NQN:nqn.none disconnected 0 controller(s)\n" {
		t.Errorf("unknown NQN: exit code %d, %q %q", code, stdout, stderr)
	}
	for _, args := range [][]string{{"-d", "ublkb9"}, {"/dev/ublkb9"}, {"ublkb9"}, {"ctrl9"}} {
		if stdout, stderr, code := run(args...); code != exit.NotFound || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("unknown device %q: exit code %d, %q %q", args, code, stdout, stderr)
		}
	}
}

// Without force a server that refuses is left alone, and says why.
func TestDisconnectBusy(t *testing.T) {
	dir := runDir(t)
	f := serveFake(t, record(t, dir, "nqn.a", state.Process{}, state.Device{ID: 3, NSID: 1}))
	f.refuse(exit.Busy)
	for _, args := range [][]string{{"-n", "nqn.a"}, {"nqn.a"}, {"-d", "ublkb3"}, {"-d", "/dev/ublkb3"}, {"ublkb3"}, {"ctrl0"}} {
		stdout, stderr, code := program(t, append([]string{"disconnect", "--run-dir", dir}, args...)...)
		if code != exit.Busy || stdout != "NQN:nqn.a disconnected 0 controller(s)\n" ||
			stderr != "ublk-nvmeof: disconnect: ctrl0: told to fail; --force ends the server nevertheless\n" {
			t.Errorf("%q: exit code %d, %q %q", args, code, stdout, stderr)
		}
	}
	if asked := f.askedFor(); len(asked) != 6 {
		t.Errorf("asked %v", asked)
	}
}

// A server that ends when it is asked.
func TestDisconnectEnds(t *testing.T) {
	for _, force := range []bool{false, true} {
		dir := runDir(t)
		p, kill := startProcess(t)
		e := record(t, dir, "nqn.a", p)
		f := serveFake(t, e)
		go func() {
			// The fake is not the process that its record names.
			<-f.first
			kill()
		}()
		stdout, stderr, code := program(t, "disconnect", "--run-dir", dir, "-n", "nqn.a", fmt.Sprintf("--force=%t", force))
		if code != exit.OK || stdout != "NQN:nqn.a disconnected 1 controller(s)\n" || stderr != "" {
			t.Errorf("force %t: exit code %d, %q %q", force, code, stdout, stderr)
		}
		if asked := f.askedFor(); !slices.Equal(asked, []bool{force}) {
			t.Errorf("asked with force %t", asked)
		}
		if left := visible(t, dir); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// With force a server that does not answer is killed, and what it left is
// cleared away.
func TestDisconnectKills(t *testing.T) {
	dir := runDir(t)
	p, _ := startProcess(t)
	record(t, dir, "nqn.a", p)
	stdout, stderr, code := program(t, "disconnect", "--run-dir", dir, "-n", "nqn.a", "--force")
	if code != exit.OK || stdout != "NQN:nqn.a disconnected 1 controller(s)\n" || stderr != "" {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	if p.Alive() {
		t.Error("the server lives")
	}
	if left := visible(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A dead server is cleared away without asking.
func TestDisconnectDead(t *testing.T) {
	dir := runDir(t)
	p, kill := startProcess(t)
	kill()
	record(t, dir, "nqn.a", p)
	if stdout, stderr, code := program(t, "disconnect", "--run-dir", dir, "nqn.a"); code != exit.OK || stderr != "" ||
		stdout != "NQN:nqn.a disconnected 1 controller(s)\n" {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	if left := visible(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestChoose(t *testing.T) {
	record := func(name, nqn string, ids ...int) state.Record {
		r := state.Record{State: state.State{Name: name, Target: state.Target{NQN: nqn}}}
		for _, id := range ids {
			r.Devices = append(r.Devices, state.Device{ID: id})
		}
		return r
	}
	records := []state.Record{record("ctrl0", "a", 0), record("ctrl1", "a", 1, 2), record("ctrl2", "b", 30), {State: state.State{Name: "ctrl3"}, Err: os.ErrInvalid}}
	for _, tt := range []struct {
		nqns, devices []string
		want          string // NQN:servers
		missing       int
	}{
		{nil, nil, "", 0},
		{[]string{"a"}, nil, "a:ctrl0,ctrl1", 0},
		{[]string{"b", "c"}, nil, "b:ctrl2 c:", 0},
		{nil, []string{"ublkb2"}, "a:ctrl1", 0},
		{nil, []string{"/dev/ublkb30", "ctrl0"}, "b:ctrl2 a:ctrl0", 0},
		{nil, []string{"ublkb3", "ublkb", "ctrl9"}, "", 3},
		{[]string{"a"}, []string{"ublkb0", "ublkb1"}, "a:ctrl0,ctrl1", 0},
		{nil, []string{"ublkb1", "ublkb2"}, "a:ctrl1", 0},
		{nil, []string{"ctrl3"}, "", 1}, // its record cannot be read
		{[]string{""}, nil, ":", 0},
	} {
		chosen, missing := choose(records, tt.nqns, tt.devices)
		var got []string
		for _, w := range chosen {
			var names []string
			for _, r := range w.records {
				names = append(names, r.Name)
			}
			got = append(got, w.nqn+":"+strings.Join(names, ","))
		}
		if s := strings.Join(got, " "); s != tt.want || len(missing) != tt.missing {
			t.Errorf("%q %q: %q, want %q; missing %v", tt.nqns, tt.devices, s, tt.want, missing)
		}
	}
}

func TestIsDevice(t *testing.T) {
	for s, want := range map[string]bool{
		"/dev/ublkb0": true, "ublkb12": true, "ublkc3": true, "ctrl0": true, "/dev/ublkc3": true,
		"nqn.2026-01.org.example:lab": false, "ublkb": false, "ublkbx": false, "ctrl": false, "ctrl-1": false, "": false, "sda": false,
	} {
		if isDevice(s) != want {
			t.Errorf("%q: %t", s, !want)
		}
	}
}
