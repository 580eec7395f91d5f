package options

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"ublk-nvmeof/auth"
)

// Names of the flags for keys, as in nvme-cli.
const (
	HostSecret       = "dhchap-secret"
	ControllerSecret = "dhchap-ctrl-secret"
)

// SecretWords describe the value of a flag for a key.
const SecretWords = "a key like DHHC-1:00:BASE64:, @FILE for a file that contains one, or none"

// KeyWords describe the value of a flag for a key that there must be.
const KeyWords = "a key like DHHC-1:00:BASE64:, or @FILE for a file that contains one"

// NoSecret is the value that means no key, as in nvme-cli's configuration.
const NoSecret = "none"

// maxSecretFile is the longest file with a key, in bytes.
const maxSecretFile = 4096

// ParseSecret reads a key from its text, or from the file that is named after "@". For
// "none" the key is nil. Errors do not contain the text of a key.
func ParseSecret(text string) (*auth.Key, error) {
	if text == NoSecret {
		return nil, nil
	}
	file, ok := strings.CutPrefix(text, "@")
	if !ok {
		return auth.ParseKey(text)
	}
	content, err := readFile(file, maxSecretFile)
	if err != nil {
		return nil, err
	}
	text = strings.TrimSpace(string(content))
	if text == "" {
		return nil, fmt.Errorf("%s is empty", file)
	}
	k, err := auth.ParseKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return k, nil
}

// secretFlag is a flag for a key. Its value is never shown: not in errors, and not in the
// arguments that set flags again.
type secretFlag struct {
	take  func(*auth.Key) error
	given []string // as they were given
	keys  []*auth.Key
}

func isSecret(f *pflag.Flag) bool {
	_, ok := f.Value.(*secretFlag)
	return ok
}

// secret returns a flag for a key that is nil if it is not given.
func secret(dst **auth.Key) *secretFlag {
	return &secretFlag{take: func(k *auth.Key) error {
		*dst = k
		return nil
	}}
}

func (v *secretFlag) String() string { return "" }
func (v *secretFlag) Type() string   { return "key" }
func (v *secretFlag) Want() string   { return SecretWords }

func (v *secretFlag) Set(s string) error {
	k, err := ParseSecret(s)
	if err == nil {
		err = v.take(k)
	}
	if err != nil {
		return &rejected{want: v.Want(), why: err}
	}
	v.given, v.keys = append(v.given, s), append(v.keys, k)
	return nil
}

// text returns the value that sets the flag again.
func (v *secretFlag) text() string {
	if n := len(v.keys); n > 0 && v.keys[n-1] != nil {
		return v.keys[n-1].Text()
	}
	return NoSecret
}

// AddSecret defines a flag for a key on f, for a verb.
func AddSecret(f *pflag.FlagSet, dst **auth.Key, name, short, usage string) {
	f.VarP(secret(dst), name, short, usage)
}

// addSecrets defines the flags for the keys of a connection.
func (c *Connect) addSecrets(f *pflag.FlagSet) {
	AddSecret(f, &c.Secret, HostSecret, "S", "key with which this host proves who it is, if the target asks (DH-HMAC-CHAP): "+SecretWords)
	AddSecret(f, &c.ControllerSecret, ControllerSecret, "C", "key that the target must prove to have as well")
}

// checkSecrets checks the keys in combination.
func (c *Connect) checkSecrets() error {
	if c.ControllerSecret != nil && c.Secret == nil {
		return fmt.Errorf("-C/--%s: want -S/--%s as well", ControllerSecret, HostSecret)
	}
	return nil
}

// OpenKeyFiles returns the files with keys, of the flags that f has parsed, that others than their
// owner can read or write.
func OpenKeyFiles(f *pflag.FlagSet) (out []string) {
	f.VisitAll(func(flag *pflag.Flag) {
		v, ok := flag.Value.(*secretFlag)
		if !ok {
			return
		}
		for _, given := range v.given {
			file, ok := strings.CutPrefix(given, "@")
			if !ok || slices.Contains(out, file) {
				continue
			}
			if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o077 != 0 {
				out = append(out, file)
			}
		}
	})
	return out
}

// DescriptorSecret is the value of a flag for a key that a descriptor contains.
func DescriptorSecret(fd int) string { return fmt.Sprintf("@/proc/self/fd/%d", fd) }

// HideSecrets returns the arguments that f has parsed, with the keys in them replaced: every
// user can read the arguments of a process. Keys that another process cannot read, because
// only this one has their descriptor, are replaced as well. The process that gets the
// arguments must have the texts as its descriptors from first on.
func HideSecrets(f *pflag.FlagSet, args []string, first int) (hidden, texts []string) {
	hidden = slices.Clone(args)
	f.VisitAll(func(flag *pflag.Flag) {
		v, ok := flag.Value.(*secretFlag)
		if !ok {
			return
		}
		for i, given := range v.given {
			if v.keys[i] == nil || given[0] == '@' && !strings.HasPrefix(given, "@/dev/") && !strings.HasPrefix(given, "@/proc/") {
				continue
			}
			replacement := DescriptorSecret(first + len(texts))
			for j, arg := range hidden {
				if head, ok := strings.CutSuffix(arg, given); ok {
					hidden[j] = head + replacement
				}
			}
			texts = append(texts, v.keys[i].Text())
		}
	})
	return hidden, texts
}
