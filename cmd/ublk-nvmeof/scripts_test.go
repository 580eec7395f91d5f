package main

import (
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// scripts are programs that people use with nvme-cli, and what they read of its JSON: for each
// command the paths, with the type that the program needs. "[]" is every element of an array.
// A program that takes "integer" accepts a number or its digits as text.
var scripts = []struct {
	name  string
	reads map[string][]string
}{
	{"nvme_metrics.py of prometheus-community/node-exporter-textfile-collector-scripts", map[string][]string{
		"list -v": {
			"Devices[].Subsystems[].Controllers[].Controller string", "Devices[].Subsystems[].Controllers[].ModelNumber string",
			"Devices[].Subsystems[].Controllers[].Firmware string", "Devices[].Subsystems[].Controllers[].SerialNumber string",
			"Devices[].Subsystems[].Controllers[].Transport string", "Devices[].Subsystems[].Controllers[].Namespaces[].NameSpace string",
			"Devices[].Subsystems[].Controllers[].Namespaces[].SectorSize number", "Devices[].Subsystems[].Controllers[].Namespaces[].PhysicalSize number",
			"Devices[].Subsystems[].Controllers[].Namespaces[].UsedBytes number",
		},
		"smart-log -v": append([]string{"critical_warning.value number"}, healthOfMetrics...),
	}},
	{"nvme_metrics.py before nvme-cli 2.11", map[string][]string{
		"list": {
			"Devices[].DevicePath string", "Devices[].ModelNumber string", "Devices[].Firmware string", "Devices[].SerialNumber string",
			"Devices[].SectorSize number", "Devices[].PhysicalSize number", "Devices[].UsedBytes number",
		},
		"smart-log": append([]string{"critical_warning number"}, healthOfMetrics...),
	}},
	{"utils/nvme_linux.go of NetApp/trident, a CSI driver", map[string][]string{
		"list-subsys": {
			"[].Subsystems[].Name string", "[].Subsystems[].NQN string", "[].Subsystems[].Paths[].Name string",
			"[].Subsystems[].Paths[].Transport string", "[].Subsystems[].Paths[].Address string", "[].Subsystems[].Paths[].State string",
		},
	}},
	{"gonvme_utils.go of dell/gonvme, the base of CSI drivers", map[string][]string{
		"list": {"Devices[].NameSpace integer", "Devices[].DevicePath string"},
		"list-subsys": {
			"[].HostNQN string", "[].HostID string", "[].Subsystems[].Name string", "[].Subsystems[].NQN string", "[].Subsystems[].Paths[].Name string",
			"[].Subsystems[].Paths[].Transport string", "[].Subsystems[].Paths[].Address string", "[].Subsystems[].Paths[].State string",
			"[].Subsystems[].Paths[].* string", // it decodes a path into a map of strings
		},
	}},
	{"src/utils/nvmeof.js of democratic-csi, on a host without nvme's own multipath", map[string][]string{
		"list -v": {
			"Devices[].Subsystems[].SubsystemNQN string", "Devices[].Subsystems[].Controllers[].Controller string",
			"Devices[].Subsystems[].Controllers[].Transport string", "Devices[].Subsystems[].Controllers[].Address string",
			"Devices[].Subsystems[].Controllers[].Namespaces[].NSID integer", "Devices[].Subsystems[].Controllers[].Namespaces[].NameSpace string",
		},
	}},
	{"qa/tasks/nvme_loop.py of ceph", map[string][]string{
		"list": {"Devices[].DevicePath string", "Devices[].ModelNumber string"},
		"list -v": {
			"Devices[].Subsystems[].Namespaces array", "Devices[].Subsystems[].Controllers[].ModelNumber string",
			"Devices[].Subsystems[].Controllers[].Namespaces[].NameSpace string",
		},
	}},
}

var healthOfMetrics = []string{
	"data_units_read integer", "data_units_written integer", "host_read_commands integer", "host_write_commands integer",
	"avail_spare number", "spare_thresh number", "percent_used number", "media_errors integer", "num_err_log_entries integer",
	"power_cycles integer", "power_on_hours integer", "controller_busy_time integer", "unsafe_shutdowns integer", "temperature number",
}

// TestScriptsForNVMe: programs for nvme-cli find what they read in our JSON, in the golden files
// and of a server that runs.
func TestScriptsForNVMe(t *testing.T) {
	i := newInspected(t, "--namespace", "ram=8MiB", "--namespace", "ram=16MiB,nsid=7,block-size=4KiB")
	defer i.close()
	goldens := map[string]string{
		"list": "list", "list -v": "list-verbose", "list-subsys": "list-subsys", "smart-log": "smart-log", "smart-log -v": "smart-human",
	}
	for _, s := range scripts {
		for command, paths := range s.reads {
			golden, err := os.ReadFile(filepath.Join("internal/output/testdata", goldens[command]+".json"))
			if err != nil {
				t.Fatal(err)
			}
			args := strings.Fields(command)
			if args[0] == "smart-log" {
				args = append(args, "/dev/"+i.status().Name) // as they call it
			}
			live := i.ok(append(args, "-o", "json")...)
			for _, p := range paths {
				// The golden files have servers that are not connected, of which less is known.
				if err := reads(golden, p, true); err != nil {
					t.Errorf("%s: golden file of %s: %v", s.name, command, err)
				}
				if err := reads([]byte(live), p, false); err != nil {
					t.Errorf("%s: %s: %v", s.name, command, err)
				}
			}
		}
	}
}

// reads reads a path with its type. With unknown, values may be null, but not all.
func reads(text []byte, pathAndType string, unknown bool) error {
	path, want, _ := strings.Cut(pathAndType, " ")
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.UseNumber()
	var doc any
	if err := d.Decode(&doc); err != nil {
		return err
	}
	values, err := follow(doc, strings.Split(strings.ReplaceAll(path, "[]", ".[]"), "."), "")
	if err != nil {
		return err
	}
	known := 0
	for _, v := range values {
		switch {
		case v != nil && !is(v, want), v == nil && !unknown:
			return fmt.Errorf("%s is %v, want %s", path, v, want)
		case v != nil:
			known++
		}
	}
	if known == 0 {
		return fmt.Errorf("%s has no value", path)
	}
	return nil
}

// follow returns all values at a path.
func follow(v any, path []string, at string) (all []any, err error) {
	for len(path) > 0 && path[0] == "" {
		path = path[1:]
	}
	if len(path) == 0 {
		return []any{v}, nil
	}
	var children []any
	switch v := v.(type) {
	case []any:
		if path[0] != "[]" {
			return nil, fmt.Errorf("%s is an array", at)
		}
		children = v
	case map[string]any:
		child, ok := v[path[0]]
		switch {
		case path[0] == "*":
			for _, child := range v {
				children = append(children, child)
			}
		case !ok:
			return nil, fmt.Errorf("%s has no %s", at, path[0])
		default:
			children = []any{child}
		}
	default:
		return nil, fmt.Errorf("%s is %v", at, v)
	}
	for _, c := range children {
		below, err := follow(c, path[1:], at+"."+path[0])
		if err != nil {
			return nil, err
		}
		all = append(all, below...)
	}
	return all, nil
}

// is reports whether a value has a type.
func is(v any, want string) bool {
	switch v := v.(type) {
	case string:
		_, digits := new(big.Int).SetString(v, 10)
		return want == "string" || want == "integer" && digits
	case json.Number:
		return want == "number" || want == "integer" && !strings.ContainsAny(v.String(), ".eE")
	case []any:
		return want == "array"
	}
	return false
}
