package nbd

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/testenv"
)

// These tests use the clients of other projects.

func randomFile(t testing.TB, size int) (path string, data []byte) {
	t.Helper()
	data = make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data)
	path = filepath.Join(t.TempDir(), "random")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, data
}

func TestNbdinfo(t *testing.T) {
	_, path := newServer(t, Config{Exports: []Export{
		{Name: "disk", Description: "the first", Device: newRAM(t, block.Geometry{LogicalBlock: 4096, Sectors: 1 << 17})},
		{Name: "other", Device: newRAM(t, block.Geometry{Sectors: 2048}), ReadOnly: true},
	}})
	out := run(t, "nbdinfo", "--list", "nbd+unix:///?socket="+path)
	for _, want := range []string{
		"newstyle-fixed without TLS, using structured packets", `export="disk"`, "description: the first", `export="other"`,
		"export-size: 67108864", "export-size: 1048576", "can_multi_conn: true", "can_fua: true", "can_flush: true", "can_trim: true",
		"can_zero: true", "can_df: true", "is_read_only: true", "is_read_only: false", "block_size_minimum: 4096", "block_size_minimum: 512",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestNbdcopy(t *testing.T) {
	const size = 16 << 20
	s, path := newServer(t, Config{Exports: []Export{{Name: "a", Device: newRAM(t, block.Geometry{Sectors: size >> 9})}}})
	file, data := randomFile(t, size)
	uri := "nbd+unix:///a?socket=" + path
	run(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", file, uri)
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", "--connections=4", "--requests=64", uri, back)
	got, err := os.ReadFile(back)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back, %v, and they differ", len(got), err)
	}
	stats := s.Snapshot("a")
	if stats.ReadBytes < size || stats.WrittenBytes < size || stats.Flushes == 0 || stats.Errors != 0 {
		t.Errorf("%+v", stats)
	}
}

func TestQemuImg(t *testing.T) {
	const size = 16 << 20
	_, path := newServer(t, Config{Exports: []Export{{Name: "a", Device: newRAM(t, block.Geometry{Sectors: size >> 9})}}})
	file, _ := randomFile(t, size)
	uri := "nbd+unix:///a?socket=" + path
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", file, uri)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, uri)
	qcow := filepath.Join(t.TempDir(), "image.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, uri)
}

func TestFio(t *testing.T) {
	s, path := newServer(t, Config{Exports: []Export{{Name: "a", Device: newRAM(t, block.Geometry{})}}})
	out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri=nbd+unix:///a?socket="+path, "--rw=randwrite", "--bsrange=512-128k",
		"--iodepth=32", "--numjobs=4", "--thread", "--size=8m", "--offset_increment=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--group_reporting")
	if !strings.Contains(out, "err= 0") {
		t.Error(out)
	}
	if st := s.Snapshot("a"); st.ReadBytes < 32<<20 || st.WrittenBytes < 32<<20 || st.Errors != 0 {
		t.Errorf("%+v", st)
	}
}

// TestLibnbd uses everything with the library behind nbdsh, in Debian's Python.
func TestLibnbd(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t)})
	t.Setenv("SOCKET", path)
	const python = "/usr/bin/python3"
	if out, err := exec.Command(tool(t, python), "-c", "import nbd").CombinedOutput(); err != nil {
		testenv.Need(t, "nbd-clients", fmt.Errorf("libnbd for Python: %s", out))
	}
	run(t, python, "testdata/options.py")
}

// TestClientTLS makes libnbd, which uses GnuTLS, copy through TLS on a TCP socket.
func TestClientTLS(t *testing.T) {
	dir := t.TempDir()
	server, _ := testTLS(t)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificates[0].Certificate[0]})
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }() // Stop ends it, and newServer waits for that of another
	uri := "nbds://" + l.Addr().String() + "/first?tls-certificates=" + dir
	if out := run(t, "nbdinfo", uri); !strings.Contains(out, "newstyle-fixed with TLS") {
		t.Error(out)
	}
	file, data := randomFile(t, 2<<20)
	run(t, "nbdcopy", file, uri)
	back := filepath.Join(dir, "back")
	run(t, "nbdcopy", uri, back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back, %v, and they differ", len(got), err)
	}
}
