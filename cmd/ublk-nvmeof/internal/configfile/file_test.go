package configfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/identity"
)

const id = "12345678-1234-1234-1234-123456789abc"

// sources is a host with a name and nothing else.
var sources = identity.Sources{
	LookupEnv: func(string) (string, bool) { return "", false },
	ReadFile:  func(string) ([]byte, error) { return nil, fs.ErrNotExist },
}

func connect(t *testing.T, args ...string) Connection {
	t.Helper()
	c, err := Connect(append(args, "--hostnqn=nqn.host", "--hostid="+id))
	if err != nil {
		t.Fatal(err)
	}
	return c[0]
}

// TestPaths: each path of a connection is a port.
func TestPaths(t *testing.T) {
	all, err := Connect([]string{"--traddr=10.0.0.1", "--nqn=nqn.disk", "--host-traddr=10.0.0.9", "--path=10.0.1.1;10.0.2.1,4421,10.0.2.9", "--hostnqn=nqn.host", "--hostid=" + id})
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	for i, want := range [][4]string{
		{"rdma", "10.0.0.1", "4420", "10.0.0.9"}, {"rdma", "10.0.1.1", "4420", ""}, {"rdma", "10.0.2.1", "4421", "10.0.2.9"},
	} {
		if got := address(&object{members: all[i].port}); got != want || all[i].NQN != "nqn.disk" || all[i].HostID != id {
			t.Errorf("%d: %v %+v", i, got, all[i])
		}
	}
}

// TestNew: the layout is that of nvme-cli 2.3 (nvme config --modify --dump).
func TestNew(t *testing.T) {
	f := New()
	if got := string(f.Bytes()); got != "[]\n" {
		t.Errorf("%q", got)
	}
	service, err := options.DefaultDiscovery().With([]string{"-a", "10.0.0.3", "-q", "nqn.host", "-I", id}, sources)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Connection{
		connect(t, "--traddr=10.0.0.1", "--nqn=nqn.disk", "-i", "3", "-D", "--frontend=nbd-socket", "-w", "10.0.0.9", "-f", "eth0"),
		connect(t, "--traddr=10.0.0.2", "--nqn=nqn.disk"),
		Discovery(service, true),
	} {
		if err := f.Set(c); err != nil {
			t.Fatal(err)
		}
	}
	const want = `[
  {
    "hostnqn":"nqn.host",
    "hostid":"12345678-1234-1234-1234-123456789abc",
    "subsystems":[
      {
        "nqn":"nqn.disk",
        "ports":[
          {
            "transport":"rdma",
            "traddr":"10.0.0.1",
            "host_traddr":"10.0.0.9",
            "host_iface":"eth0",
            "trsvcid":"4420",
            "nr_io_queues":3,
            "duplicate_connect":true
          },
          {
            "transport":"rdma",
            "traddr":"10.0.0.2",
            "trsvcid":"4420"
          }
        ]
      },
      {
        "nqn":"nqn.2014-08.org.nvmexpress.discovery",
        "ports":[
          {
            "transport":"rdma",
            "traddr":"10.0.0.3",
            "trsvcid":"4420",
            "persistent":true,
            "discovery":true
          }
        ]
      }
    ]
  }
]
`
	if got := string(f.Bytes()); got != want {
		t.Errorf("%s", got)
	}
}

// TestKeeps: what is there and unknown stays, in its place and with its text.
func TestKeeps(t *testing.T) {
	const before = `{
  "comment":"<&> \u00e9",
  "hosts":[
    {
      "hostnqn":"nqn.other",
      "subsystems":[]
    },
    {
      "hostnqn":"nqn.host",
      "dhchap_key":"DHHC-1:00:secret",
      "subsystems":[
        {
          "nqn":"nqn.disk",
          "application":"x",
          "ports":[
            {
              "transport":"tcp",
              "traddr":"10.0.0.1"
            },
            {
              "queue_size":32,
              "transport":"rdma",
              "traddr":"10.0.0.1",
              "tls":false,
              "future":{
                "deep":[
                  1.50,
                  null
                ]
              }
            }
          ]
        }
      ]
    }
  ]
}
`
	f, err := Parse([]byte(before))
	if err != nil {
		t.Fatal(err)
	}
	same := strings.ReplaceAll(before, `\u00e9`, "é")
	if got := string(f.Bytes()); got != same {
		t.Errorf("%s", got)
	}
	if err := f.Set(connect(t, "--traddr=10.0.0.1", "--nqn=nqn.disk", "-Q", "64", "-k", "7")); err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(same, `"queue_size":32`, `"queue_size":64`, 1)
	want = strings.Replace(want, "                ]\n              }\n", "                ]\n              },\n              \"trsvcid\":\"4420\",\n              \"keep_alive_tmo\":7\n", 1)
	if got := string(f.Bytes()); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"7":                                     "want an array of hosts",
		"; a comment\n [Subsystem] \n":          ErrFabricsConf.Error(),
		"[1]":                                   "host 0: want an object",
		`{"hosts": 1}`:                          "hosts: want an array",
		"[{]":                                   "invalid character",
		"[{":                                    "unexpected EOF",
		"[] []":                                 "more after the end",
		strings.Repeat("[", 100):                "nested more than 32 times",
		`[{"hostnqn": "nqn.host", "hostid": 1`:  "EOF",
		"[{\"a\": \"\xff\"}, \"unterminated]":   "EOF",
		`{"hosts": [{"hostnqn": "x"}, "host"]}`: "host 1: want an object",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %s", text, err, want)
		}
	}
	for text, want := range map[string]string{
		`[{"hostnqn": "nqn.host", "subsystems": 1}]`:                                     "subsystems: want an array",
		`[{"hostnqn": "nqn.host", "subsystems": [1]}]`:                                   "subsystem 0: want an object",
		`[{"hostnqn": "nqn.host", "subsystems": [{"nqn": "nqn.disk", "ports": {}}]}]`:    "ports: want an array",
		`[{"hostnqn": "nqn.host", "subsystems": [{"nqn": "nqn.disk", "ports": ["x"]}]}]`: "port 0: want an object",
	} {
		f, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Set(connect(t, "--traddr=10.0.0.1", "--nqn=nqn.disk")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestWrite: a file is replaced as a whole, and keeps its mode; a link stays a link.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "real.json"), filepath.Join(dir, "config.json")
	if err := errors.Join(os.WriteFile(file, []byte("[]"), 0o600), os.Symlink("real.json", link)); err != nil {
		t.Fatal(err)
	}
	f, err := Read(link)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Set(connect(t, "--traddr=10.0.0.1", "--nqn=nqn.disk")), f.Write(link)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	info, serr := os.Stat(file)
	if err != nil || serr != nil || !strings.Contains(string(text), "nqn.disk") || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: %s", err, info, text)
	}
	if kind, err := os.Lstat(link); err != nil || kind.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("%v, %v", kind, err)
	}
	if err := New().Write(filepath.Join(dir, "new.json")); err != nil {
		t.Error(err)
	}
	if err := New().Write(filepath.Join(dir, "none", "new.json")); err == nil {
		t.Error("a file in no directory was written")
	}
	for _, other := range []string{dir, os.DevNull} { // a rename would put a file in its place
		if err := New().Write(other); err == nil || !strings.Contains(err.Error(), "it is no regular file") {
			t.Errorf("%s: %v", other, err)
		}
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 3 {
		t.Errorf("%v, %v", all, err)
	}
}

// FuzzParse: a file that is read and written again means the same.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`[{"hostnqn": "x", "subsystems": [{"nqn": "y", "ports": [{"traddr": "z", "n": 1e9}]}]}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		first, err := Parse(text)
		if err != nil {
			return
		}
		second, err := Parse(first.Bytes())
		if err != nil || string(second.Bytes()) != string(first.Bytes()) {
			t.Fatalf("%v\n%s\n%s", err, first.Bytes(), second.Bytes())
		}
	})
}
