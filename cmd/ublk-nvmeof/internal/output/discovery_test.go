package output

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"ublk-nvmeof/discovery"
	"ublk-nvmeof/nvme"
)

// discoveryLog is the log of which nvme-cli 2.3 printed discover.txt and discover.json of testdata: that of nvmet with
// a subsystem and a referral.
func discoveryLog(t *testing.T) *discovery.Log {
	t.Helper()
	log := &discovery.Log{Generation: 6}
	for _, e := range []struct {
		kind             nvme.SubsystemType
		treq             nvme.TransportRequirements
		port             uint16
		nqn, addr, trsvc string
	}{
		{nvme.SubsystemCurrentDiscovery, nvme.TREQDisableSQFlow, 1, nvme.DiscoveryNQN, "10.0.2.15", "4420"},
		{nvme.SubsystemNVMe, nvme.TREQDisableSQFlow, 1, "nqn.2026-01.org.example:lab", "10.0.2.15", "4420"},
		{nvme.SubsystemReferral, 0, 0, nvme.DiscoveryNQN, "10.9.9.9", "8009"},
	} {
		var d discovery.Entry
		d.SetTRTYPE(nvme.TransportRDMA)
		d.SetADRFAM(nvme.AddressIPv4)
		d.SetSUBTYPE(e.kind)
		d.SetTREQ(e.treq)
		d.SetPORTID(e.port)
		d.SetRDMAQPType(nvme.RDMAConnected)
		d.SetRDMAProvider(nvme.RDMAProviderNotSpecified)
		d.SetRDMACMS(nvme.RDMACM)
		if err := errors.Join(d.SetSUBNQN(e.nqn), d.SetTRADDR(e.addr), d.SetTRSVCID(e.trsvc)); err != nil {
			t.Fatal(err)
		}
		log.Entries = append(log.Entries, d)
	}
	return log
}

func TestDiscovery(t *testing.T) {
	log := discoveryLog(t)
	for file, format := range map[string]string{"discover.txt": Normal, "discover.json": JSON} {
		var b bytes.Buffer
		if err := Discovery(&b, log, format); err != nil {
			t.Fatal(err)
		}
		golden(t, file, b.Bytes())
	}
	// What a service says can do no harm to a terminal, and JSON stays JSON.
	log.Entries = log.Entries[:1]
	copy(log.Entries[0].DiscoveryEntry[512:], "a\x1b[2J\"\n<&>")
	var b strings.Builder
	if err := Discovery(&b, log, Normal); err != nil || !strings.Contains(b.String(), `traddr:  a\x1b[2J"\n<&>`) {
		t.Errorf("%v: %q", err, b.String())
	}
	b.Reset()
	if err := Discovery(&b, log, JSON); err != nil || !strings.Contains(b.String(), `"traddr":"a\u001b[2J\"\n<&>`) {
		t.Errorf("%v: %q", err, b.String())
	}
	b.Reset()
	if err := Discovery(&b, &discovery.Log{}, JSON); err != nil || b.String() != "{\n  \"genctr\":0,\n  \"records\":[]\n}\n" {
		t.Errorf("%v: %q", err, b.String())
	}
	// The fields of RDMA mean nothing on another transport.
	log.Entries[0].SetTRTYPE(nvme.TransportTCP)
	b.Reset()
	log.Entries[0].SetTCPSecurity(nvme.TCPSecurityTLS13)
	if err := Discovery(&b, log, Normal); err != nil || strings.Contains(b.String(), "rdma") || !strings.HasSuffix(b.String(), "eflags:  none\nsectype: tls13\n") {
		t.Errorf("%v: %q", err, b.String())
	}
	var tcp bytes.Buffer
	if err := Discovery(&tcp, log, JSON); err != nil {
		t.Error(err)
	}
	golden(t, "discover-tcp.json", tcp.Bytes())
}
