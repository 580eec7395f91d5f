package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// The tests are one host, so that none of them leaves an identity on this machine.
func init() {
	for name, value := range map[string]string{
		"LIBNVME_HOSTNQN": "nqn.2026-01.org.example:test-host", "LIBNVME_HOSTID": "77777777-7777-7777-7777-777777777777",
	} {
		if _, set := os.LookupEnv(name); !set {
			os.Setenv(name, value)
		}
	}
}

// Connects of a host that nobody named, even at the same time, are of the same
// host: the second one to the same subsystem is refused.
func TestHostThatNobodyNamed(t *testing.T) {
	tmp := stickyDir(t)
	t.Setenv("LIBNVME_HOSTNQN", "")
	t.Setenv("LIBNVME_HOSTID", "")
	un := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execAs(t, victim, tmp, args...)
	}
	if _, stderr, code := un("target", "--background", "-a", loopback(), "--provider", "roce", "-n", "nqn.a", "--namespace", "ram=1MiB"); code != exit.OK {
		t.Fatal(stderr)
	}
	defer un("target", "stop")
	defer un("disconnect", "--force", "-n", "nqn.a")
	connect := func() (string, exit.Code) {
		_, stderr, code := un("connect", "-a", loopback(), "-n", "nqn.a", "-i", "1", "--provider", "roce", "--frontend", "nbd-socket")
		return stderr, code
	}
	codes := make([]exit.Code, 2)
	var wg sync.WaitGroup
	for i := range codes {
		wg.Go(func() { _, codes[i] = connect() })
	}
	wg.Wait()
	if codes[0]+codes[1] != exit.AlreadyServed {
		t.Errorf("exit codes %v, want one success and one %d", codes, exit.AlreadyServed)
	}
	if stderr, code := connect(); code != exit.AlreadyServed {
		t.Errorf("a third time: exit code %d, %s", code, stderr)
	}
	id, err := os.ReadFile(filepath.Join(tmp, ".local/state", programName, "hostid"))
	if err != nil {
		t.Fatal(err)
	}
	stdout, _, _ := un("list", "-o", "json")
	var l struct{ Controllers []control.Status }
	if err := json.Unmarshal([]byte(stdout), &l); err != nil || len(l.Controllers) != 1 ||
		l.Controllers[0].HostID != strings.TrimSpace(string(id)) || !strings.HasSuffix(l.Controllers[0].HostNQN, ":uuid:"+l.Controllers[0].HostID) {
		t.Errorf("id %q, %v\n%s", id, err, stdout)
	}
	logs, err := filepath.Glob(filepath.Join(tmp, programName+"-*", "ctrl0", "log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("%v, %v", logs, err)
	}
	if text, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(text), `generated=yes kept=`+tmp+"/.local/state/ublk-nvmeof/hostid") {
		t.Errorf("%v\n%s", err, text)
	}
}
