package main

import (
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func TestProperties(t *testing.T) {
	target := state.Target{NQN: "nqn.2026-01.org.example:a/b\n"}
	for name, tt := range map[string]struct {
		device state.Device
		want   string
	}{
		"all": {
			state.Device{NSID: 3, UUID: "u-1", NGUID: "0a", EUI64: "0b", Model: "Model  X/1 ", Serial: " S\"1"},
			`ID_BUS=nvme ID_MODEL=Model_X_1 ID_SERIAL_SHORT=S_1 ID_NSID=3 UBLK_NVMEOF_NQN=nqn.2026-01.org.example:a_b UBLK_NVMEOF_UUID=u-1 UBLK_NVMEOF_NGUID=0a UBLK_NVMEOF_EUI64=0b ID_PATH=nvmeof-nqn.2026-01.org.example:a_b-ns-3 ID_SERIAL=Model_X_1_S_1_3 ID_WWN=uuid.u-1`,
		},
		"without identifiers": {
			state.Device{NSID: 1, Model: "M"},
			`ID_BUS=nvme ID_MODEL=M ID_NSID=1 UBLK_NVMEOF_NQN=nqn.2026-01.org.example:a_b ID_PATH=nvmeof-nqn.2026-01.org.example:a_b-ns-1`,
		},
	} {
		var b strings.Builder
		if err := writeProperties(&b, target, tt.device); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(strings.ReplaceAll(b.String(), "\n", " ")); got != tt.want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, tt.want)
		}
	}
}
