// Package identity finds out how targets know this host: its NQN and its identifier, where
// nvme-cli and libnvme find them. The functions may be called from any goroutine.
package identity

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"ublk-nvmeof/internal/rundir"
	"ublk-nvmeof/nvme"
)

// Sources is where the identity of a host comes from. The zero value is this
// host.
type Sources struct {
	// NQNName and IDName are what errors call the values that the caller asks for.
	NQNName, IDName string // empty: "host NQN" and "host id"

	LookupEnv func(string) (string, bool)  // nil: os.LookupEnv
	ReadFile  func(string) ([]byte, error) // nil: os.ReadFile
	NewUUID   func() nvme.UUID             // nil: nvme.NewUUID
	// Keep stores a generated identifier for the next time and returns the name of
	// the file with what is in it, which somebody else may have stored before.
	// nil: in the user's persistent directory.
	Keep func(text string) (file, kept string, err error)
}

func (s Sources) withDefaults() Sources {
	s.NQNName, s.IDName = cmp.Or(s.NQNName, "host NQN"), cmp.Or(s.IDName, "host id")
	if s.LookupEnv == nil {
		s.LookupEnv = os.LookupEnv
	}
	if s.ReadFile == nil {
		s.ReadFile = os.ReadFile
	}
	if s.NewUUID == nil {
		s.NewUUID = nvme.NewUUID
	}
	if s.Keep == nil {
		s.Keep = keepHostID
	}
	return s
}

// keepHostID is Sources.Keep of this host.
func keepHostID(text string) (file, kept string, err error) {
	if file, err = keptHostID(); err != nil {
		return "", "", err
	}
	if err := rundir.Make(filepath.Dir(file), 0o755); err != nil {
		return "", "", err
	}
	line, err := rundir.Keep(file, []byte(text+"\n"), 0o644)
	return file, string(line), err
}

// keptHostID is the file that keeps a generated identifier.
func keptHostID() (string, error) {
	dir, err := rundir.Persistent()
	return filepath.Join(dir, "hostid"), err
}

// machineIDs name the machine, if they are there.
var machineIDs = []string{"/sys/class/dmi/id/product_uuid", "/proc/device-tree/ibm,partition-uuid"}

// Host is how targets know this host.
type Host struct {
	NQN      string
	ID       nvme.UUID
	File     string   // that holds a generated ID; empty: the ID is not generated
	Warnings []string // for a log
}

const wantUUID = "want a UUID like 12345678-1234-1234-1234-123456789abc"

// Find finds the host's name and identifier as libnvme does (tree.c,
// nvme_host_get_ids), so that targets see the same host: what the caller asks for,
// else the environment (a variable that is set but empty hides the file), else
// the files of /etc/nvme. Without an identifier, it is the UUID in the name,
// else the machine's. libnvme would make up a new one each time if there is none
// of these; here it is kept. Without a name, the name is made from the
// identifier.
func Find(wantNQN, wantID string, from Sources) (Host, error) {
	from = from.withDefaults()
	nqn, nqnFrom, err := from.given(wantNQN, from.NQNName, "LIBNVME_HOSTNQN", "/etc/nvme/hostnqn")
	if err != nil {
		return Host{}, err
	}
	text, idFrom, err := from.given(wantID, from.IDName, "LIBNVME_HOSTID", "/etc/nvme/hostid")
	if err != nil {
		return Host{}, err
	}
	if nqn != "" {
		if err := nvme.ValidateNQN(nqn); err != nil {
			return Host{}, fmt.Errorf("%s %q: %w; want a name of 1 to 223 bytes", nqnFrom, nqn, err)
		}
	}
	out := Host{NQN: nqn}
	if text != "" {
		if out.ID, err = nvme.ParseUUID(text); err != nil || out.ID.IsZero() {
			return Host{}, fmt.Errorf("%s %q: %s", idFrom, text, wantUUID)
		}
	} else if err := from.derive(&out); err != nil {
		return Host{}, err
	}
	if nqn == "" {
		out.NQN = nvme.UUIDNQN(out.ID)
	}
	// Distributions put two random UUIDs into the files of /etc/nvme. That is odd, but
	// it is one host everywhere.
	bothFiles := filepath.IsAbs(nqnFrom) && filepath.IsAbs(idFrom)
	if named, ok := uuidOf(out.NQN); ok && named != out.ID && !bothFiles {
		out.Warnings = append(out.Warnings, fmt.Sprintf("host NQN %q has another UUID than the host id %s; a target may take them for two hosts", out.NQN, out.ID))
	}
	return out, nil
}

// errNoIdentity is a host without an identifier.
var errNoIdentity = errors.New("this host has no NQN yet: connect generates one and keeps it; gen-hostnqn makes one for /etc/nvme/hostnqn")

// ReadOnly returns sources that keep nothing: a generated identifier is the one that was
// kept before, or else one that lasts as long as the process.
func (s Sources) ReadOnly() Sources {
	s = s.withDefaults()
	s.Keep = func(string) (file, kept string, err error) {
		if file, err = keptHostID(); err != nil {
			return file, "", err
		}
		text, err := s.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			err = errNoIdentity
		}
		return file, string(text), err
	}
	return s
}

// HostNQN returns the NQN of this host that connect uses without flags. An identifier that
// would have to be generated is an error, because connect has not kept one yet.
func HostNQN(from Sources) (string, error) {
	from = from.ReadOnly()
	keep := from.Keep
	var none error
	from.Keep = func(text string) (file, kept string, err error) {
		file, kept, err = keep(text)
		if err != nil {
			none = errNoIdentity
		}
		return file, kept, err
	}
	host, err := Find("", "", from)
	return host.NQN, errors.Join(err, none)
}

// GenerateHostNQN makes an NQN of the machine's identifier, or of a new one if it has none.
func GenerateHostNQN(from Sources) string {
	from = from.withDefaults()
	id, ok := from.machineID()
	if !ok {
		id = from.NewUUID()
	}
	return nvme.UUIDNQN(id)
}

// given is what the caller, environment or file say, and which of them it was.
func (s Sources) given(want, name, env, file string) (value, source string, err error) {
	if want != "" {
		return want, name, nil
	}
	if v, ok := s.LookupEnv(env); ok {
		return strings.TrimSpace(v), "$" + env, nil
	}
	text, err := s.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("%s: %w", name, err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimSpace(line), file, nil
}

// uuidOf is the UUID in an NQN that has one.
func uuidOf(nqn string) (nvme.UUID, bool) {
	_, after, ok := strings.Cut(nqn, "uuid:")
	id, err := nvme.ParseUUID(after)
	return id, ok && err == nil && !id.IsZero()
}

// derive finds an identifier for a host that was given none.
func (s Sources) derive(out *Host) (err error) {
	var ok bool
	if out.ID, ok = uuidOf(out.NQN); ok {
		return nil
	}
	if out.ID, ok = s.machineID(); ok {
		return nil
	}
	out.ID = s.NewUUID()
	file, kept, err := s.Keep(out.ID.String())
	switch {
	case errors.Is(err, errNoIdentity):
		out.Warnings = append(out.Warnings, err.Error())
		return nil
	case err != nil:
		out.Warnings = append(out.Warnings, fmt.Sprintf("host id %s was generated and cannot be kept, so the next connect will be another host's; use --hostid or /etc/nvme/hostid (%v)", out.ID, err))
		return nil
	}
	out.File = file
	if out.ID, err = nvme.ParseUUID(strings.TrimSpace(kept)); err != nil || out.ID.IsZero() {
		return fmt.Errorf("%s %q: %s; remove the file to have one generated", file, kept, wantUUID)
	}
	return nil
}

// machineID is the identifier that the firmware has.
func (s Sources) machineID() (nvme.UUID, bool) {
	for _, file := range machineIDs {
		text, err := s.ReadFile(file)
		if err != nil {
			continue
		}
		id, err := nvme.ParseUUID(strings.Trim(string(text), "\x00 \n"))
		// Firmware without an identifier says all zeroes or all ones.
		if err == nil && !id.IsZero() && id != allOnes {
			return id, true
		}
	}
	return nvme.UUID{}, false
}

var allOnes = func() (id nvme.UUID) {
	for i := range id {
		id[i] = 0xFF
	}
	return id
}()
