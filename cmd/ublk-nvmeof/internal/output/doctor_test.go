package output

import (
	"bytes"
	"encoding/json"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/doctor"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// diagnosis has each status, and text of a peer.
var diagnosis = []doctor.Result{
	{Check: "io_uring", Status: doctor.OK, Finding: "can be used"},
	{Check: "mtu", Status: doctor.Warn, Finding: "the MTU of eth0 is 1000, so packets carry 512 bytes of data", Remedy: "set an MTU of 4200 or more"},
	{Check: "admin_connect", Status: doctor.Fail, Finding: "10.0.2.15:4420 has no subsystem nqn.\x1b[1mx", Remedy: "check -n", Code: exit.UnknownSubsys},
}

func TestDoctorGolden(t *testing.T) {
	for file, format := range map[string]string{"doctor.txt": Normal, "doctor.json": JSON} {
		var b bytes.Buffer
		if err := Doctor(&b, diagnosis, format); err != nil {
			t.Fatal(err)
		}
		golden(t, file, b.Bytes())
	}
	for n, want := range []doctor.Status{doctor.OK, doctor.OK, doctor.Warn, doctor.Fail} {
		var b bytes.Buffer
		var out struct{ Status doctor.Status }
		if err := Doctor(&b, diagnosis[:n], JSON); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b.Bytes(), &out); err != nil || out.Status != want {
			t.Errorf("%d checks: %q, %v, want %q", n, out.Status, err, want)
		}
	}
}
