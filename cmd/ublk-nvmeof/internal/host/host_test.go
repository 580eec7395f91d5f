package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestModulePresent(t *testing.T) {
	dir := t.TempDir()
	m := Module{"m", filepath.Join(dir, "node*")}
	if m.Present() {
		t.Error("present without a node")
	}
	if err := os.WriteFile(filepath.Join(dir, "node0"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !m.Present() {
		t.Error("absent with a node")
	}
}

func TestLoadUnknownModule(t *testing.T) {
	err := Module{Name: "no_such_module"}.Load()
	if err == nil || !strings.HasPrefix(err.Error(), "load module no_such_module: ") {
		t.Error(err)
	}
}

func TestSetName(t *testing.T) {
	before, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	defer SetName(strings.TrimSpace(string(before)))
	if err := SetName("ublk-nvmeof"); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile("/proc/self/comm")
	if err != nil || string(after) != "ublk-nvmeof\n" {
		t.Errorf("%q, %v", after, err)
	}
}
