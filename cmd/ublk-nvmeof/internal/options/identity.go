package options

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"ublk-nvmeof/nvme"
)

// Sources is where the identity of a host comes from. The zero value is this
// host.
type Sources struct {
	LookupEnv func(string) (string, bool)  // nil: os.LookupEnv
	ReadFile  func(string) ([]byte, error) // nil: os.ReadFile
	NewUUID   func() nvme.UUID             // nil: nvme.NewUUID
}

func (s Sources) withDefaults() Sources {
	if s.LookupEnv == nil {
		s.LookupEnv = os.LookupEnv
	}
	if s.ReadFile == nil {
		s.ReadFile = os.ReadFile
	}
	if s.NewUUID == nil {
		s.NewUUID = nvme.NewUUID
	}
	return s
}

// machineIDs name the machine, if they are there.
var machineIDs = []string{"/sys/class/dmi/id/product_uuid", "/proc/device-tree/ibm,partition-uuid"}

// identity finds the host's name and identifier as libnvme does (tree.c,
// nvme_host_get_ids), which is why targets see the same host as before: what
// the flags say, else the environment (set but empty: none), else the files of
// /etc/nvme. Without an identifier, the UUID in the name is it, else the
// machine's, else a random one. Without a name, it is made of the identifier.
func identity(nqnFlag, idFlag string, from Sources) (string, nvme.UUID, error) {
	from = from.withDefaults()
	nqn, nqnFrom, err := from.given(nqnFlag, "-q/--hostnqn", "LIBNVME_HOSTNQN", "/etc/nvme/hostnqn")
	if err != nil {
		return "", nvme.UUID{}, err
	}
	text, idFrom, err := from.given(idFlag, "-I/--hostid", "LIBNVME_HOSTID", "/etc/nvme/hostid")
	if err != nil {
		return "", nvme.UUID{}, err
	}
	if nqn != "" {
		if err := nvme.ValidateNQN(nqn); err != nil {
			return "", nvme.UUID{}, fmt.Errorf("%s %q: %w; want a name of 1 to 223 bytes", nqnFrom, nqn, err)
		}
	}
	var id nvme.UUID
	switch {
	case text != "":
		if id, err = nvme.ParseUUID(text); err != nil || id.IsZero() {
			return "", nvme.UUID{}, fmt.Errorf("%s %q: want a UUID like 12345678-1234-1234-1234-123456789abc", idFrom, text)
		}
	default:
		id = from.derive(nqn)
	}
	if nqn == "" {
		nqn = nvme.UUIDNQN(id)
	}
	return nqn, id, nil
}

// given is what flag, environment or file say, and which of them it was.
func (s Sources) given(flag, flagName, env, file string) (value, source string, err error) {
	if flag != "" {
		return flag, flagName, nil
	}
	if v, ok := s.LookupEnv(env); ok {
		return strings.TrimSpace(v), "$" + env, nil
	}
	text, err := s.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", flagName, err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line), file, nil
}

// derive finds an identifier for a host that was given none.
func (s Sources) derive(nqn string) nvme.UUID {
	if _, after, ok := strings.Cut(nqn, "uuid:"); ok {
		if id, err := nvme.ParseUUID(after); err == nil && !id.IsZero() {
			return id
		}
	}
	for _, file := range machineIDs {
		text, err := s.ReadFile(file)
		if err != nil {
			continue
		}
		id, err := nvme.ParseUUID(strings.Trim(string(text), "\x00 \n"))
		// Firmware without an identifier says all zeroes or all ones.
		if err == nil && !id.IsZero() && id != allOnes {
			return id
		}
	}
	return s.NewUUID()
}

var allOnes = func() (id nvme.UUID) {
	for i := range id {
		id[i] = 0xFF
	}
	return id
}()
