package identity

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"ublk-nvmeof/nvme"
)

const (
	idFlag   = "11111111-1111-1111-1111-111111111111"
	idEnv    = "22222222-2222-2222-2222-222222222222"
	idFile   = "33333333-3333-3333-3333-333333333333"
	idNQN    = "44444444-4444-4444-4444-444444444444"
	idDMI    = "55555555-5555-5555-5555-555555555555"
	idRandom = "66666666-6666-6666-6666-666666666666"

	nqnFile = "/etc/nvme/hostnqn"
	dmiFile = "/sys/class/dmi/id/product_uuid"
)

// nowhere is a host that nobody named.
var nowhere = Sources{
	LookupEnv: func(string) (string, bool) { return "", false },
	ReadFile:  func(string) ([]byte, error) { return nil, fs.ErrNotExist },
	NewUUID: func() nvme.UUID {
		id, err := nvme.ParseUUID(idRandom)
		if err != nil {
			panic(err)
		}
		return id
	},
	Keep: func(text string) (string, string, error) { return "/kept", text, nil },
}

func sources(env, files map[string]string) Sources {
	s := nowhere
	s.LookupEnv = func(k string) (string, bool) {
		v, ok := env[k]
		return v, ok
	}
	s.ReadFile = func(name string) ([]byte, error) {
		if text, ok := files[name]; ok {
			return []byte(text), nil
		}
		return nil, fs.ErrNotExist
	}
	return s
}

type vars = map[string]string

func TestIdentityPrecedence(t *testing.T) {
	all := vars{nqnFile: "nqn.file\n", "/etc/nvme/hostid": idFile + "\n", dmiFile: strings.ToUpper(idDMI) + "\n"}
	env := vars{"LIBNVME_HOSTNQN": "nqn.env", "LIBNVME_HOSTID": idEnv}
	uuidNQN := nvme.NQNUUIDPrefix + idNQN
	for _, tt := range []struct {
		name            string
		nqn, id         string
		env, files      vars
		wantNQN, wantID string
	}{
		{"flags over all", "nqn.flag", idFlag, env, all, "nqn.flag", idFlag},
		{"environment over files", "", "", env, all, "nqn.env", idEnv},
		{"files", "", "", nil, all, "nqn.file", idFile},
		{"flag for one only", "nqn.flag", "", nil, all, "nqn.flag", idFile},
		{"empty environment hides the files", "", "", vars{"LIBNVME_HOSTNQN": "", "LIBNVME_HOSTID": ""}, all,
			nvme.NQNUUIDPrefix + idDMI, idDMI},
		{"id of the name", uuidNQN, "", nil, vars{dmiFile: idDMI}, uuidNQN, idNQN},
		{"id of the name in the file", "", "", nil, vars{nqnFile: uuidNQN, dmiFile: idDMI}, uuidNQN, idNQN},
		{"name without an id", "nqn.plain", "", nil, vars{dmiFile: idDMI}, "nqn.plain", idDMI},
		{"name with half an id", "nqn.x:uuid:123", "", nil, vars{dmiFile: idDMI}, "nqn.x:uuid:123", idDMI},
		{"machine", "", "", nil, vars{dmiFile: idDMI}, nvme.NQNUUIDPrefix + idDMI, idDMI},
		{"machine without firmware", "", "", nil, vars{"/proc/device-tree/ibm,partition-uuid": idDMI + "\x00"}, nvme.NQNUUIDPrefix + idDMI, idDMI},
		{"firmware that says nothing", "", "", nil, vars{dmiFile: "ffffffff-ffff-ffff-ffff-ffffffffffff"}, nvme.NQNUUIDPrefix + idRandom, idRandom},
		{"firmware that says zero", "", "", nil, vars{dmiFile: "00000000-0000-0000-0000-000000000000"}, nvme.NQNUUIDPrefix + idRandom, idRandom},
		{"nothing at all", "", "", nil, nil, nvme.NQNUUIDPrefix + idRandom, idRandom},
		{"id only", "", idFlag, nil, nil, nvme.NQNUUIDPrefix + idFlag, idFlag},
		{"empty files", "", "", nil, vars{nqnFile: "\n", "/etc/nvme/hostid": ""}, nvme.NQNUUIDPrefix + idRandom, idRandom},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Find(tt.nqn, tt.id, sources(tt.env, tt.files))
			if err != nil || got.NQN != tt.wantNQN || got.ID.String() != tt.wantID {
				t.Errorf("got %+v, %v; want %s %s", got, err, tt.wantNQN, tt.wantID)
			}
			if generated := tt.wantID == idRandom; (got.File == "/kept") != generated || len(got.Warnings) > 0 {
				t.Errorf("kept in %q, warnings %q", got.File, got.Warnings)
			}
		})
	}
}

func TestIdentityErrorsNameTheirSource(t *testing.T) {
	long := strings.Repeat("x", 224)
	for _, tt := range []struct {
		env, files vars
		want       string
	}{
		{vars{"LIBNVME_HOSTNQN": long}, nil, `$LIBNVME_HOSTNQN "x`},
		{nil, vars{nqnFile: long}, nqnFile + ` "x`},
		{vars{"LIBNVME_HOSTID": "a"}, nil, `$LIBNVME_HOSTID "a": want a UUID`},
		{nil, vars{"/etc/nvme/hostid": "b\n"}, `/etc/nvme/hostid "b": want a UUID`},
	} {
		if _, err := Find("", "", sources(tt.env, tt.files)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
	s := nowhere
	s.ReadFile = func(string) ([]byte, error) { return nil, fs.ErrPermission }
	if _, err := Find("", "", s); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v, want a permission error", err)
	}
}

// A name with a UUID and another identifier are two hosts to some targets.
func TestIdentityWarnsOfTwoUUIDs(t *testing.T) {
	got, err := Find(nvme.NQNUUIDPrefix+idNQN, idFlag, nowhere)
	if err != nil || len(got.Warnings) != 1 || !strings.Contains(got.Warnings[0], idNQN) || !strings.Contains(got.Warnings[0], "host id "+idFlag) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, from := range map[string]Sources{
		"name in the file, id given":        sources(nil, vars{nqnFile: nvme.NQNUUIDPrefix + idNQN}),
		"name in the environment, id given": sources(vars{"LIBNVME_HOSTNQN": nvme.NQNUUIDPrefix + idNQN}, nil),
	} {
		if got, err := Find("", idFlag, from); err != nil || len(got.Warnings) != 1 {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	// As Debian's nvme-cli makes them.
	files := sources(nil, vars{nqnFile: nvme.NQNUUIDPrefix + idNQN, "/etc/nvme/hostid": idFile})
	if got, err := Find("", "", files); err != nil || len(got.Warnings) > 0 {
		t.Errorf("both from files: %+v, %v", got, err)
	}
	for nqn, id := range map[string]string{nvme.NQNUUIDPrefix + idNQN: idNQN, "nqn.plain": idFlag} {
		if got, err := Find(nqn, id, nowhere); err != nil || len(got.Warnings) > 0 {
			t.Errorf("%s %s: %+v, %v", nqn, id, got, err)
		}
	}
}

// A generated identifier is the same the next time, and for two that start at
// the same time.
func TestGeneratedIdentityIsKept(t *testing.T) {
	t.Setenv("STATE_DIRECTORY", filepath.Join(t.TempDir(), "state"))
	from := nowhere
	from.NewUUID, from.Keep = nil, nil
	ids := make([]string, 8)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			got, err := Find("", "", from)
			if err != nil || len(got.Warnings) > 0 || got.File != os.Getenv("STATE_DIRECTORY")+"/hostid" {
				t.Errorf("%+v, %v", got, err)
			}
			ids[i] = got.NQN + " " + got.ID.String()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("two hosts: %q", ids)
		}
	}
	file := os.Getenv("STATE_DIRECTORY") + "/hostid"
	if err := os.WriteFile(file, []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Find("", "", from); err == nil || !strings.Contains(err.Error(), file+` "nonsense\n": want a UUID`) {
		t.Errorf("a file without a UUID: %v", err)
	}
}

func TestGeneratedIdentityThatCannotBeKept(t *testing.T) {
	from := nowhere
	from.Keep = func(string) (string, string, error) { return "", "", syscall.EROFS }
	got, err := Find("", "", from)
	if err != nil || got.ID.String() != idRandom || got.File != "" || len(got.Warnings) != 1 ||
		!strings.Contains(got.Warnings[0], "cannot be kept") || !strings.Contains(got.Warnings[0], "read-only file system") {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestHostNQN shows what connect would use, and generates nothing.
func TestHostNQN(t *testing.T) {
	t.Setenv("STATE_DIRECTORY", "/state")
	for name, tt := range map[string]struct {
		env, files vars
		want       string // empty: an error
	}{
		"file":                {nil, vars{nqnFile: "nqn.file\n", dmiFile: idDMI}, "nqn.file"},
		"environment":         {vars{"LIBNVME_HOSTNQN": "nqn.env"}, vars{nqnFile: "nqn.file\n", "/state/hostid": idFile}, "nqn.env"},
		"firmware":            {nil, vars{dmiFile: idDMI}, "nqn.2014-08.org.nvmexpress:uuid:" + idDMI},
		"kept by connect":     {nil, vars{"/state/hostid": idFile + "\n"}, "nqn.2014-08.org.nvmexpress:uuid:" + idFile},
		"nothing":             {nil, nil, ""},
		"a file that is none": {nil, vars{nqnFile: strings.Repeat("x", 300)}, ""},
	} {
		got, err := HostNQN(sources(tt.env, tt.files))
		if tt.want == "" && err == nil || tt.want != "" && (err != nil || got != tt.want) {
			t.Errorf("%s: %q, %v, want %q", name, got, err, tt.want)
		}
	}
}

func TestGenerateHostNQN(t *testing.T) {
	const prefix = "nqn.2014-08.org.nvmexpress:uuid:"
	if got := GenerateHostNQN(sources(nil, vars{nqnFile: "nqn.file", dmiFile: idDMI})); got != prefix+idDMI {
		t.Errorf("of the firmware: %s", got)
	}
	if got := GenerateHostNQN(nowhere); got != prefix+idRandom {
		t.Errorf("without firmware: %s", got)
	}
}
