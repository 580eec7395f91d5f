package nvme

import "testing"

func TestAsyncEvent(t *testing.T) {
	for e, want := range map[AsyncEvent]string{
		0x00040002: "notice: namespaces changed (log 04h)",
		0x00030102: "notice: firmware activation starting (log 03h)",
		0x000C0302: "notice: ana states changed (log 0ch)",
		0x0070F002: "notice: discovery log changed (log 70h)",
		0x00010300: "error: persistent internal error (log 01h)",
		0x00020101: "health: temperature beyond threshold (log 02h)",
		0x00800006: "i/o command set: reservation log available (log 80h)",
		0x00000003: "immediate: normal subsystem shutdown",
		0x00001207: "vendor: information 12h",
		0x00003302: "notice: information 33h",
		0x00000005: "type 5: information 00h",
	} {
		if got := e.String(); got != want {
			t.Errorf("%#x: %q, want %q", uint32(e), got, want)
		}
	}
	e := AsyncEvent(0x0070F002)
	if e.Type() != EventNotice || e.Info() != NoticeDiscoveryChanged || e.LogPage() != LogDiscovery {
		t.Errorf("decoded %d %#x %#x", e.Type(), e.Info(), e.LogPage())
	}
	if got := NewAsyncEvent(EventNotice, NoticeDiscoveryChanged, LogDiscovery); got != e {
		t.Errorf("built %#x", uint32(got))
	}
	if mask := uint32(AENNamespaceAttribute | AENFirmwareActivation | AENANAChange | AENDiscoveryChange); mask != 0x80000B00 {
		t.Errorf("aen mask %#x", mask)
	}
}
