package host

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// lab is the controller that is looked for.
var lab = NVMeController{
	Address: netip.MustParseAddrPort("192.0.2.1:4420"), NQN: "nqn.lab", HostNQN: "nqn.host",
	CNTLID: 7, Serial: "serial", Model: "Linux",
}

// labAttrs is what sysfs says of it.
var labAttrs = map[string]string{
	"state": "live", "transport": "rdma", "subsysnqn": "nqn.lab", "hostnqn": "nqn.host", "cntlid": "7",
	"address": "traddr=192.0.2.1,trsvcid=4420", "dev": "240:0", "kato": "5",
}

// fakeNVMe is a device of the kernel's initiator.
type fakeNVMe struct {
	number        string
	cntlid        uint16
	serial, model string
	err           error
	answers       <-chan struct{} // nil: at once
}

func (f fakeNVMe) Number() (string, error) { return f.number, nil }
func (f fakeNVMe) Close() error            { return nil }

func (f fakeNVMe) Identify() (*nvme.IdentifyController, error) {
	if f.answers != nil {
		<-f.answers
	}
	id := new(nvme.IdentifyController)
	id.SetCNTLID(f.cntlid)
	return id, errors.Join(id.SetSN(f.serial), id.SetMN(f.model), f.err)
}

// labDevice answers as the controller that is looked for.
var labDevice = fakeNVMe{number: "240:0", cntlid: 7, serial: "serial", model: "Linux"}

// kernelWith is a kernel with one controller per argument.
func kernelWith(t *testing.T, device fakeNVMe, controllers ...map[string]string) *KernelNVMe {
	t.Helper()
	k := NewKernelNVMe()
	k.class, k.proc = t.TempDir(), procWith(t, "kthreadd", "net:[1]", "net:[1]")
	for i, attrs := range controllers {
		dir := filepath.Join(k.class, "nvme"+string(rune('0'+i)))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, value := range attrs {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	k.open = func(string) (nvmeDevice, error) { return device, nil }
	return k
}

// procWith is a procfs with a process 2 and this process in network namespaces.
func procWith(t *testing.T, name, kernel, own string) string {
	t.Helper()
	dir := t.TempDir()
	for process, network := range map[string]string{"2": kernel, "self": own} {
		ns := filepath.Join(dir, process, "ns")
		if err := errors.Join(os.MkdirAll(ns, 0o755), os.Symlink(network, filepath.Join(ns, "net")),
			os.WriteFile(filepath.Join(dir, process, "comm"), []byte(name+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// with returns labAttrs with another value of one attribute.
func with(attr, value string) map[string]string {
	m := maps.Clone(labAttrs)
	m[attr] = value
	return m
}

func without(attr string) map[string]string {
	m := maps.Clone(labAttrs)
	delete(m, attr)
	return m
}

// TestKernelHas: what proves that an id is a controller of the kernel's initiator now. The
// worst that can happen here is a wrong yes.
func TestKernelHas(t *testing.T) {
	one := func(attrs map[string]string) []map[string]string { return []map[string]string{attrs} }
	answering := func(change func(*fakeNVMe)) fakeNVMe {
		d := labDevice
		change(&d)
		return d
	}
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		controllers []map[string]string
		device      fakeNVMe
		want        bool
	}{
		"it":                         {one(labAttrs), labDevice, true},
		"it, beside others":          {[]map[string]string{with("transport", "pcie"), with("cntlid", "8"), labAttrs}, labDevice, true},
		"it, with a source address":  {one(with("address", "traddr=192.0.2.1,trsvcid=4420,host_traddr=192.0.2.2,src_addr=192.0.2.2")), labDevice, true},
		"it, without keep alive":     {one(with("kato", "0")), labDevice, true}, // Identify needs none
		"none":                       {nil, labDevice, false},
		"connecting":                 {one(with("state", "connecting")), labDevice, false},
		"resetting":                  {one(with("state", "resetting")), labDevice, false},
		"deleting":                   {one(with("state", "deleting")), labDevice, false},
		"over TCP":                   {one(with("transport", "tcp")), labDevice, false},
		"another id":                 {one(with("cntlid", "8")), labDevice, false},
		"no id yet":                  {one(with("cntlid", "")), labDevice, false},
		"another subsystem":          {one(with("subsysnqn", "nqn.other")), labDevice, false},
		"discovery controller":       {one(with("subsysnqn", nvme.DiscoveryNQN)), labDevice, false},
		"another host NQN":           {one(with("hostnqn", "nqn.other")), labDevice, false},
		"no host NQN in sysfs":       {one(without("hostnqn")), labDevice, false},
		"no state in sysfs":          {one(without("state")), labDevice, false},
		"no address in sysfs":        {one(without("address")), labDevice, false},
		"no device number in sysfs":  {one(without("dev")), labDevice, false},
		"another address":            {one(with("address", "traddr=192.0.2.2,trsvcid=4420")), labDevice, false},
		"another port":               {one(with("address", "traddr=192.0.2.1,trsvcid=4421")), labDevice, false},
		"a host name":                {one(with("address", "traddr=lab,trsvcid=4420")), labDevice, false},
		"no service":                 {one(with("address", "traddr=192.0.2.1")), labDevice, false},
		"reconnected meanwhile":      {one(labAttrs), answering(func(d *fakeNVMe) { d.cntlid = 8 }), false},
		"deleted meanwhile":          {one(labAttrs), answering(func(d *fakeNVMe) { d.err = gone }), false},
		"name given away meanwhile":  {one(labAttrs), answering(func(d *fakeNVMe) { d.number = "240:1" }), false},
		"subsystem of another array": {one(labAttrs), answering(func(d *fakeNVMe) { d.serial = "other" }), false},
		"another model":              {one(labAttrs), answering(func(d *fakeNVMe) { d.model = "SPDK" }), false},
	} {
		if got := kernelWith(t, c.device, c.controllers...).Has(t.Context(), lab); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	k := kernelWith(t, labDevice, labAttrs)
	k.open = func(string) (nvmeDevice, error) { return nil, os.ErrPermission }
	if k.Has(t.Context(), lab) {
		t.Error("a user who may not ask the controller believes sysfs")
	}
	for _, proc := range []string{
		procWith(t, "kthreadd", "net:[1]", "net:[2]"), procWith(t, "sh", "net:[1]", "net:[1]"), t.TempDir(),
	} {
		k := kernelWith(t, labDevice, labAttrs)
		k.proc = proc
		if k.Has(t.Context(), lab) {
			t.Error("a controller counts whose target may be in another network")
		}
	}
	k.class += "/none"
	if k.Has(t.Context(), lab) {
		t.Error("a kernel without NVMe has it")
	}
}

// TestKernelHasMapped: an IPv4 address that is written as an IPv6 one is the same.
func TestKernelHasMapped(t *testing.T) {
	c := lab
	c.Address = netip.MustParseAddrPort("[::ffff:192.0.2.1]:4420")
	if !kernelWith(t, labDevice, labAttrs).Has(t.Context(), c) {
		t.Error("not found")
	}
}

// TestKernelStale: a controller that is live only because the kernel has not noticed yet
// that its target is gone proves nothing, and holds nobody up. Its answer to an earlier
// question is none to a later one.
func TestKernelStale(t *testing.T) {
	answers := make(chan struct{})
	d := labDevice
	d.answers = answers
	k := kernelWith(t, d, labAttrs)
	soon := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	for range 3 {
		if k.Has(soon(), lab) {
			t.Fatal("found, although it does not answer")
		}
	}
	later := make(chan bool)
	go func() { later <- k.Has(t.Context(), lab) }()
	answers <- struct{}{} // to the first question; the second and third were not asked
	select {
	case <-later:
		t.Error("the answer to the first question was taken for one to the last")
	case answers <- struct{}{}:
	}
	if !<-later {
		t.Error("not found, although it answers")
	}
}
