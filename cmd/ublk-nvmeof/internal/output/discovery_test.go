package output

import (
	"errors"
	"strings"
	"testing"

	"ublk-nvmeof/discovery"
	"ublk-nvmeof/nvme"
)

// discoveryLog is the log of which nvme-cli 2.3 printed the texts below: that of nvmet with
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

const discoveryText = `
Discovery Log Number of Records 3, Generation counter 6
=====Discovery Log Entry 0======
trtype:  rdma
adrfam:  ipv4
subtype: current discovery subsystem
treq:    not specified, sq flow control disable supported
portid:  1
trsvcid: 4420
subnqn:  nqn.2014-08.org.nvmexpress.discovery
traddr:  10.0.2.15
eflags:  none
rdma_prtype: not specified
rdma_qptype: connected
rdma_cms:    rdma-cm
rdma_pkey: 0x0000
=====Discovery Log Entry 1======
trtype:  rdma
adrfam:  ipv4
subtype: nvme subsystem
treq:    not specified, sq flow control disable supported
portid:  1
trsvcid: 4420
subnqn:  nqn.2026-01.org.example:lab
traddr:  10.0.2.15
eflags:  none
rdma_prtype: not specified
rdma_qptype: connected
rdma_cms:    rdma-cm
rdma_pkey: 0x0000
=====Discovery Log Entry 2======
trtype:  rdma
adrfam:  ipv4
subtype: discovery subsystem referral
treq:    not specified
portid:  0
trsvcid: 8009
subnqn:  nqn.2014-08.org.nvmexpress.discovery
traddr:  10.9.9.9
eflags:  none
rdma_prtype: not specified
rdma_qptype: connected
rdma_cms:    rdma-cm
rdma_pkey: 0x0000
`

const discoveryJSONText = `{
  "genctr":6,
  "records":[
    {
      "trtype":"rdma",
      "adrfam":"ipv4",
      "subtype":"current discovery subsystem",
      "treq":"not specified, sq flow control disable supported",
      "portid":1,
      "trsvcid":"4420",
      "subnqn":"nqn.2014-08.org.nvmexpress.discovery",
      "traddr":"10.0.2.15",
      "eflags":"none",
      "rdma_prtype":"not specified",
      "rdma_qptype":"connected",
      "rdma_cms":"rdma-cm",
      "rdma_pkey":0
    },
    {
      "trtype":"rdma",
      "adrfam":"ipv4",
      "subtype":"nvme subsystem",
      "treq":"not specified, sq flow control disable supported",
      "portid":1,
      "trsvcid":"4420",
      "subnqn":"nqn.2026-01.org.example:lab",
      "traddr":"10.0.2.15",
      "eflags":"none",
      "rdma_prtype":"not specified",
      "rdma_qptype":"connected",
      "rdma_cms":"rdma-cm",
      "rdma_pkey":0
    },
    {
      "trtype":"rdma",
      "adrfam":"ipv4",
      "subtype":"discovery subsystem referral",
      "treq":"not specified",
      "portid":0,
      "trsvcid":"8009",
      "subnqn":"nqn.2014-08.org.nvmexpress.discovery",
      "traddr":"10.9.9.9",
      "eflags":"none",
      "rdma_prtype":"not specified",
      "rdma_qptype":"connected",
      "rdma_cms":"rdma-cm",
      "rdma_pkey":0
    }
  ]
}
`

func TestDiscovery(t *testing.T) {
	log := discoveryLog(t)
	for format, want := range map[string]string{Normal: discoveryText, JSON: discoveryJSONText} {
		var b strings.Builder
		if err := Discovery(&b, log, format); err != nil || b.String() != want {
			t.Errorf("%s: %v\n%s", format, err, b.String())
		}
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
}
