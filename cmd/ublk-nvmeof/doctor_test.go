package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/doctor"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/internal/testenv"
)

// examination is the output of doctor -o json.
type examination struct {
	Status doctor.Status
	Checks []struct {
		Check    string
		Status   doctor.Status
		Finding  string
		Remedy   string
		ExitCode exit.Code `json:"exit_code"`
	}
}

// result returns the result of a check as a line.
func (e examination) result(check string) (doctor.Status, string) {
	for _, c := range e.Checks {
		if c.Check == check {
			return c.Status, c.Finding + "; " + c.Remedy
		}
	}
	return "", ""
}

// decode checks that the exit code is that of the first check that failed, and that the one
// line of the error names it.
func decode(t *testing.T, out, errs string, code exit.Code) (e examination) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		t.Fatalf("%v: %s%s", err, out, errs)
	}
	want, failed := exit.OK, ""
	for _, c := range e.Checks {
		if c.Status == doctor.Fail && want == exit.OK {
			want, failed = c.ExitCode, c.Check
		}
	}
	if code != want || failed == "" && errs != "" || failed != "" && !strings.HasPrefix(errs, "ublk-nvmeof: doctor: failed: "+failed) {
		t.Errorf("exit code %d, want %d of %q: %s", code, want, failed, errs)
	}
	return e
}

// examine runs doctor in network and mount namespaces of its own, after the commands of a
// shell. There, v0 leads to 10.77.0.0/24.
func examine(t *testing.T, prepare string, env []string, args ...string) examination {
	t.Helper()
	const network = `ip link set lo up
ip link add v0 type veth peer name v1
ip addr add 10.77.0.2/24 dev v0
ip link set v0 up; ip link set v1 up
un() { "$program" --run-dir "$dir" "$@"; }
`
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := runDir(t)
	script := network + prepare + "\n" + `exec $with "$program" --run-dir "$dir" doctor -o json "$@"`
	cmd := exec.CommandContext(t.Context(), "unshare", append([]string{"--net", "--mount", "sh", "-eufc", script, "sh"}, args...)...)
	// A host that has no files of its own.
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0", "program="+program, "dir="+dir, "with=",
		"LIBNVME_HOSTNQN=nqn.host", "LIBNVME_HOSTID=12345678-1234-1234-1234-123456789abc")
	cmd.Env = append(cmd.Env, env...)
	// Files, because servers that prepare starts keep standard error.
	texts := map[string]string{}
	for name, to := range map[string]*io.Writer{"out": &cmd.Stdout, "errs": &cmd.Stderr} {
		file, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		*to = file
		texts[name] = file.Name()
	}
	defer execProgram(t, "--run-dir", dir, "target", "stop")
	defer execProgram(t, "--run-dir", dir, "disconnect-all", "--force")
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	for name, file := range texts {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(text)
	}
	return decode(t, texts["out"], texts["errs"], exit.Code(cmd.ProcessState.ExitCode()))
}

// needNamespaces ends the test without network namespaces, and the tools for them.
func needNamespaces(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("unshare", "--net", "--mount", "sh", "-c", "ip link add type veth && nft list ruleset && setarch --version").CombinedOutput(); err != nil {
		testenv.Need(t, "netns", errors.New(strings.TrimSpace(err.Error()+": "+string(out))))
	}
}

// sanlock runs a process that has the name of sanlock until the test ends.
func sanlock(t *testing.T) {
	t.Helper()
	program := filepath.Join(runDir(t), "sanlock")
	sleep, err := exec.LookPath("sleep")
	if err == nil {
		err = exec.Command("cp", sleep, program).Run()
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// TestDoctorOfAnIllHost makes each check of the host fail, for real: in namespaces, and by
// limits. The driver and RDMA devices need the VM (e2e/testdata/doctor.txtar).
func TestDoctorOfAnIllHost(t *testing.T) {
	needNamespaces(t)
	sanlock(t)
	far := []string{"-a", "10.77.0.1", "--timeout", "1s"}
	roce := append(slices.Clone(far), "--provider", "roce")
	const noAnswer = `ip route replace 10.77.0.1/32 dev v0; ip neigh replace 10.77.0.1 lladdr 02:00:00:00:00:01 dev v0` // nobody has this address
	for _, tt := range []struct {
		check   string
		prepare string
		env     []string
		args    []string
		status  doctor.Status
		want    string
	}{
		{"kernel", `with="setarch --uname-2.6"`, nil, nil, doctor.Warn, "older than 6.1"},
		{"io_uring", "", []string{confined + "=seccomp=1"}, nil, doctor.Fail, "a seccomp filter, as containers have"},
		{"ublk", `[ ! -d /lib/modules ] || mount -t tmpfs none /lib/modules; mount -t tmpfs none /dev`, nil, []string{"--frontend", "ublk"}, doctor.Fail, "has no module ublk_drv"},
		{"memlock", `with="setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock"`, []string{confined + "=memlock=65536"}, []string{"-i", "1"}, doctor.Fail, "may lock 64 KiB"},
		{"nofile", "ulimit -n 40", nil, nil, doctor.Fail, "may open 40 files"},
		{"nofile", "ulimit -n 256", nil, nil, doctor.Warn, "may open 256 files"},
		{"host_identity", "", nil, []string{"-q", "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555"}, doctor.Warn, "has another UUID than the host id"},
		{"host_identity", `un target -a 127.0.0.1 --provider roce --background -n nqn.x --namespace ram=1MiB >/dev/null
un connect -a 127.0.0.1 --provider roce --frontend nbd-socket -n nqn.x -i 1 >/dev/null`, nil, []string{"-I", "12345678-1234-1234-1234-123456789abd"}, doctor.Fail, "ctrl0 has host NQN nqn.host and host id 12345678-1234-1234-1234-123456789abc"},
		{"host_clone", `mkdir "$dir/nvme"; echo nqn.image >"$dir/nvme/hostnqn"; echo 12345678-1234-1234-1234-123456789abc >"$dir/nvme/hostid"
touch -d 2020-01-01 "$dir/nvme/hostid"; echo x >"$dir/machine-id"
[ -e /etc/machine-id ] || mount -t tmpfs none /etc
[ -e /etc/machine-id ] || cp "$dir/machine-id" /etc
[ -d /etc/nvme ] || mkdir /etc/nvme
mount --bind "$dir/nvme" /etc/nvme; mount --bind "$dir/machine-id" /etc/machine-id`, nil, nil, doctor.Warn, "/etc/nvme/hostid is older than /etc/machine-id"},
		{"lease_times", "", nil, []string{"-k", "30"}, doctor.Warn, "sanlock gives up when I/O stands still for 80 s"},
		{"resolve", "", nil, []string{"-a", "no.such.host.invalid"}, doctor.Fail, "no.such.host.invalid"},
		{"route", "", nil, []string{"-a", "192.0.2.99"}, doctor.Fail, "ip route get 192.0.2.99"},
		{"rdma_device", "", nil, append(slices.Clone(far), "--provider", "verbs"), doctor.Fail, "no RDMA device is on v0"},
		{"link", "ip link set v1 down", nil, far, doctor.Fail, "v0 has no carrier"},
		{"mtu", "ip link set v0 mtu 1000", nil, far, doctor.Warn, "carry 512 bytes"},
		{"mtu", "ip link set v0 mtu 300", nil, far, doctor.Fail, "too small for any packet"},
		{"tos", "", nil, []string{"--tos", "5"}, doctor.Warn, "use --tos 4"},
		{"udp_port", `un target -a 10.77.0.2 --provider roce --background -n nqn.x --namespace ram=1MiB >/dev/null`, nil, roce, doctor.Warn, "UDP port 4791 of 10.77.0.2 is taken by process "},
		{"udp_filter", noAnswer + `; nft 'add table inet t; add chain inet t in {type filter hook input priority 0;}; add rule inet t in udp dport 4791 drop'`, nil, roce, doctor.Fail, "does not arrive"},
		{"udp_filter", `nft 'add table inet t; add chain inet t out {type filter hook output priority 0;}; add rule inet t out udp dport 4791 drop'`, nil, roce, doctor.Fail, "refuses to send"},
		{"connection", noAnswer, nil, roce, doctor.Fail, "no answer from 10.77.0.1:4420 in time"},
	} {
		t.Run(tt.check+"/"+tt.want, func(t *testing.T) {
			t.Parallel()
			e := examine(t, tt.prepare, tt.env, tt.args...)
			if status, text := e.result(tt.check); status != tt.status || !strings.Contains(text, tt.want) {
				t.Errorf("%s: %s, want %s: %s\n%+v", status, text, tt.status, tt.want, e)
			}
		})
	}
}

// TestDoctorOfATarget makes each step to a target fail.
func TestDoctorOfATarget(t *testing.T) {
	address := netip.MustParseAddr(loopback()).Next().Next().String()
	dir := runDir(t)
	un := func(args ...string) string {
		t.Helper()
		out, errs, code := execProgram(t, append([]string{"--run-dir", dir}, args...)...)
		if code != exit.OK {
			t.Fatalf("%q: exit code %d, %s", args, code, errs)
		}
		return out
	}
	un("target", "-a", address, "-s", "4441", "--provider", "roce", "--background", "-n", "nqn.a", "--namespace", "ram=1MiB",
		"-n", "nqn.closed", "--allow-host", "nqn.other", "--namespace", "ram=1MiB", "-n", "nqn.empty")
	defer execProgram(t, "--run-dir", dir, "target", "stop")
	for _, tt := range []struct {
		fault  string // of the target
		args   string
		check  string // the last one
		status doctor.Status
		code   exit.Code
		want   string
	}{
		{"", "", "discovery", doctor.OK, exit.OK, "the target lists 2 subsystems for this host: nqn.a, nqn.empty"},
		{"", "-n nqn.a -i 2", "namespaces", doctor.OK, exit.OK, "1 namespace: 1 (1.0 MiB)"},
		{"", "-s 4442", "connection", doctor.Fail, exit.Rejected, "nobody listens at"},
		{"reject 6", "-n nqn.a", "connection", doctor.Fail, exit.Rejected, "rejected the connection"},
		{"fault lid=0x70,status=0x6,dnr", "", "discovery", doctor.Fail, exit.Negotiation, "internal error"},
		{"", "-n nqn.none", "admin_connect", doctor.Fail, exit.UnknownSubsys, "has no subsystem nqn.none"},
		{"", "-n nqn.closed", "admin_connect", doctor.Fail, exit.HostNotAllowed, "does not admit host"},
		{"fault cns=1,status=0x6,dnr", "-n nqn.a", "identify", doctor.Fail, exit.Negotiation, "identify controller"},
		{"grant none", "-n nqn.a", "queues", doctor.Fail, exit.Negotiation, "granted no I/O queues"},
		{"fault cns=2,status=0x6,dnr", "-n nqn.a", "namespaces", doctor.Fail, exit.Negotiation, "identify namespaces"},
		{"", "-n nqn.empty", "namespaces", doctor.Fail, exit.NotFound, "has no namespace that can be used"},
	} {
		t.Run(tt.check+"/"+tt.want, func(t *testing.T) {
			if tt.fault != "" {
				un(append([]string{"target"}, strings.Fields(tt.fault)...)...)
				defer un("target", "clear")
			}
			out, errs, code := execProgram(t, append([]string{"--run-dir", dir, "doctor", "-o", "json", "-a", address, "-s", "4441", "--provider", "roce"}, strings.Fields(tt.args)...)...)
			e := decode(t, out, errs, code)
			last := e.Checks[len(e.Checks)-1]
			if last.Check != tt.check || last.Status != tt.status || code != tt.code || !strings.Contains(last.Finding, tt.want) || (last.Status == doctor.Fail) != (last.Remedy != "") {
				t.Errorf("exit code %d, %+v", code, last)
			}
		})
	}
	// Some command after the two Connect commands is the first that enables the controller.
	examine := func(more ...string) (examination, exit.Code) {
		t.Helper()
		out, errs, code := execProgram(t, append([]string{"--run-dir", dir, "doctor", "-o", "json", "-a", address, "-s", "4441", "--provider", "roce", "-n", "nqn.a"}, more...)...)
		return decode(t, out, errs, code), code
	}
	for skip := 1; ; skip++ {
		un("target", "fault", fmt.Sprintf("admin,opcode=fabrics,skip=%d,count=1,status=0x6,dnr", skip))
		e, code := examine()
		un("target", "clear")
		last := e.Checks[len(e.Checks)-1]
		if last.Check == "enable" {
			if last.Status != doctor.Fail || code != exit.Negotiation || !strings.Contains(last.Finding, "enable controller") {
				t.Errorf("exit code %d, %+v", code, last)
			}
			break
		}
		if skip > 20 {
			t.Fatalf("enable did not fail: %+v", e)
		}
	}
	un("target", "grant", "1")
	e, code := examine("-W", "1")
	if status, text := e.result("queues"); status != doctor.Warn || !strings.Contains(text, "1 of ") || code != exit.OK {
		t.Errorf("exit code %d, %s: %s", code, status, text)
	}
	var list struct {
		Targets []struct{ Controllers []any }
	}
	if err := json.Unmarshal([]byte(un("target", "list", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	if left := list.Targets[0].Controllers; len(left) > 0 {
		t.Errorf("controllers are left: %v", left)
	}
}
