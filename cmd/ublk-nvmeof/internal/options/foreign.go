package options

import (
	"errors"

	"github.com/spf13/pflag"
)

// foreign are flags of nvme-cli that other transports than RDMA have.
var foreign = []struct {
	name, short string
	valued      bool
}{
	{"hdr-digest", "g", false}, {"data-digest", "G", false}, {"tls", "", false}, {"concat", "", false},
	{"tls-key", "", true}, {"tls-key-identity", "", true}, {"keyring", "", true},
}

// addForeign defines the foreign flags, each of which is refused.
func addForeign(f *pflag.FlagSet) {
	for _, o := range foreign {
		flag := f.VarPF(foreignValue{}, o.name, o.short, "only NVMe/TCP has it")
		flag.Hidden = true
		if !o.valued {
			flag.NoOptDefVal = "true"
		}
	}
}

var errForeign = errors.New("only NVMe/TCP has this flag; want none, because the transport is rdma")

type foreignValue struct{}

func (foreignValue) String() string   { return "" }
func (foreignValue) Type() string     { return "value" }
func (foreignValue) Set(string) error { return errForeign }

// checkWord accepts printable ASCII without spaces.
func checkWord(s string) error {
	if s == "" || len(s) > 255 {
		return errUnwanted
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return errUnwanted
		}
	}
	return nil
}

// Underscores makes names of flags equal that differ in underscores and hyphens only,
// because nvme-cli has both (--fast_io_fail_tmo).
func Underscores(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	b := []byte(name)
	for i := range b {
		if b[i] == '_' {
			b[i] = '-'
		}
	}
	return pflag.NormalizedName(b)
}
