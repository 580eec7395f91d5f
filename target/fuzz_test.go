package target

import (
	"testing"

	"ublk-nvmeof/nvme"
)

// FuzzCapsule sends capsules of any content on an admin and an I/O queue. The
// target may answer or end the connection; another controller must not notice,
// and all must be freed.
func FuzzCapsule(f *testing.F) {
	for _, build := range []func(*nvme.Command){
		func(c *nvme.Command) { c.SetRead(1, 0, 8, true); c.SetKeyedSGL(0, 4096, 1, true) },
		func(c *nvme.Command) { c.SetWrite(1, 0, 1, false); c.SetInCapsuleSGL(0, 512) },
		func(c *nvme.Command) { c.SetDSM(1, 256); c.SetInCapsuleSGL(0, 4096) },
		func(c *nvme.Command) { c.SetDSM(1, 1); c.SetInCapsuleSGL(0, 16) },
		func(c *nvme.Command) { c.SetWriteZeroes(1, 0, 65536, false, false) },
		func(c *nvme.Command) { c.SetGetLogPage(nvme.LogANA, 0, 4096, 1<<40, false) },
		func(c *nvme.Command) { c.SetIdentify(nvme.CNSActiveNSList, nvme.NSIDAll, 0) },
		func(c *nvme.Command) { c.SetSetFeatures(nvme.FeatureKeepAlive, 1<<31) },
		func(c *nvme.Command) { c.SetAsyncEvent() },
		func(c *nvme.Command) { c.SetPropertySet(nvme.PropCC, 1<<63, false) },
		func(c *nvme.Command) { c.SetConnect(0, 31, 0, true) },
		func(c *nvme.Command) { c.SetDisconnect() },
	} {
		var cmd nvme.Command
		build(&cmd)
		f.Add(cmd[:], false)
		f.Add(append(cmd[:], make([]byte, 4096)...), true)
	}
	f.Add([]byte{1, 2, 3}, true)
	f.Fuzz(func(t *testing.T, capsule []byte, io bool) {
		r, _, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
		a := r.admin(testNQN)
		h := a
		if io {
			h = r.io(a, 1, 8)
		}
		witness := r.admin(testNQN)
		capsule = capsule[:min(len(capsule), h.capsule)]
		copy(h.out.Bytes(), capsule)
		h.sendRaw(0, len(capsule))
		// A command behind it, on an I/O queue answered whatever the first did.
		var cmd nvme.Command
		cmd.SetFlush(1)
		cmd.SetCID(0xABCD)
		copy(h.out.Bytes()[h.capsule:], cmd[:])
		h.sendRaw(h.capsule, nvme.CommandSize)
		for h.await() && h.response.CID() != 0xABCD {
		}
		witness.property(nvme.PropCSTS, false)
	})
}

// FuzzStream sends a valid mixture at an unconnected queue and at a connected
// one, with one byte of each command changed.
func FuzzStream(f *testing.F) {
	f.Add(uint64(1), uint8(0), uint8(0))
	f.Add(uint64(7), uint8(39), uint8(0x4F))
	f.Fuzz(func(t *testing.T, seed uint64, at, value uint8) {
		r, _, _ := newDisk(t, Config{}, 64<<10, NamespaceConfig{})
		h := r.io(r.admin(testNQN), 1, 16)
		commands := hotCommands(h)
		names := []string{"read 4k", "write 4k", "compare", "flush", "dsm", "zeroes"}
		sent := 0
		for i := range 12 {
			var cmd nvme.Command
			inline := commands[names[(seed>>(4*i))%uint64(len(names))]](&cmd)
			if i%3 == 0 {
				cmd[at%nvme.CommandSize] = value
			}
			h.send(&cmd, inline)
			sent++
		}
		for range sent {
			if !h.await() {
				return
			}
		}
	})
}
