package options

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/target"
)

// HostAuth says how a host must authenticate to a target.
type HostAuth struct {
	Host string
	target.HostAuth
}

// check returns an error if there is no key.
func (a HostAuth) check() error {
	if a.Key == nil {
		return fmt.Errorf("--dhchap-key: no value is given for host %s; want %s", a.Host, SecretWords)
	}
	return nil
}

// hostAuth is how the host of the last --allow-host must authenticate.
func (t *Target) hostAuth() (*target.HostAuth, error) {
	if len(t.Subsystems) == 0 || len(t.Subsystems[len(t.Subsystems)-1].AllowHosts) == 0 {
		return nil, errors.New("it applies to the host of the --allow-host before it; want --nqn and --allow-host first")
	}
	s := &t.Subsystems[len(t.Subsystems)-1]
	host := s.AllowHosts[len(s.AllowHosts)-1]
	i := slices.IndexFunc(s.Auth, func(a HostAuth) bool { return a.Host == host })
	if i < 0 {
		i = len(s.Auth)
		s.Auth = append(s.Auth, HostAuth{Host: host})
	}
	return &s.Auth[i].HostAuth, nil
}

// addAuthFlags defines the flags that set what the result of to points to.
func addAuthFlags(f *pflag.FlagSet, to func() (*target.HostAuth, error)) {
	set := func(change func(*target.HostAuth) error) error {
		a, err := to()
		if err != nil {
			return err
		}
		return change(a)
	}
	f.Var(&secretFlag{take: func(k *auth.Key) error {
		return set(func(a *target.HostAuth) error { a.Key = k; return nil })
	}}, "dhchap-key", "key with which the host must authenticate (DH-HMAC-CHAP): "+SecretWords)
	f.Var(&secretFlag{take: func(k *auth.Key) error {
		return set(func(a *target.HostAuth) error { a.ControllerKey = k; return nil })
	}}, "dhchap-ctrl-key", "key with which controllers authenticate to the host, if it asks")
	hashes, groups := auth.Hashes(), auth.Groups()
	f.Var(&each{kind: "hashes", want: listOf(hashes), take: func(text string) error {
		return set(func(a *target.HostAuth) (err error) { a.Hashes, err = parseList(text, hashes); return err })
	}}, "dhchap-hash", "hashes that may be used, the best first (default: all, the strongest first): "+listOf(hashes))
	f.Var(&each{kind: "groups", want: listOf(groups), take: func(text string) error {
		return set(func(a *target.HostAuth) (err error) { a.Groups, err = parseList(text, groups); return err })
	}}, "dhchap-dhgroup", "Diffie-Hellman groups that may be used, the best first (default: all, the strongest first): "+listOf(groups))
	f.Var(&each{kind: "all|admin", want: "all or admin", take: func(text string) error {
		return set(func(a *target.HostAuth) error {
			a.AdminOnly = text == "admin"
			if !a.AdminOnly && text != "all" {
				return errUnwanted
			}
			return nil
		})
	}}, "dhchap-queues", "queues that the host must authenticate: all, or only the admin queue, like nvmet (default all)")
}

// listOf describes a list of some values.
func listOf[T fmt.Stringer](all []T) string {
	var names []string
	for _, v := range all {
		names = append(names, v.String())
	}
	return "one or more of " + orList(names) + ", separated by commas"
}

// parseList reads a list of some of the values.
func parseList[T fmt.Stringer](text string, all []T) (out []T, err error) {
	for word := range strings.SplitSeq(text, ",") {
		i := slices.IndexFunc(all, func(v T) bool { return v.String() == word })
		if i < 0 {
			return nil, errUnwanted
		}
		out = append(out, all[i])
	}
	return out, nil
}

// AddHostAuthFlags defines the flags that say how one host must authenticate.
func AddHostAuthFlags(f *pflag.FlagSet, a *HostAuth) {
	addAuthFlags(f, func() (*target.HostAuth, error) { return &a.HostAuth, nil })
}

// HostAuthText is a change of a HostAuth that can be encoded. What is empty stays as it is. It
// contains secrets, and String leaves them out.
type HostAuthText struct {
	Key           string       `json:"dhchap_key,omitempty"` // NoSecret: the host need not authenticate any more
	ControllerKey string       `json:"dhchap_ctrl_key,omitempty"`
	Hashes        []auth.Hash  `json:"hashes,omitempty"`
	Groups        []auth.Group `json:"groups,omitempty"`
	AdminOnly     *bool        `json:"admin_only,omitempty"`
}

// String describes t without the keys.
func (t HostAuthText) String() string {
	return fmt.Sprintf("key %t, controller key %t, hashes %v, groups %v, admin only %t", t.Key != "", t.ControllerKey != "", t.Hashes, t.Groups, t.AdminOnly != nil && *t.AdminOnly)
}

// Change returns the change that the flags of AddHostAuthFlags make, which f has parsed into a.
func (a HostAuth) Change(f *pflag.FlagSet) (t HostAuthText, err error) {
	for _, k := range []struct {
		flag string
		key  *auth.Key
		to   *string
	}{{"dhchap-key", a.Key, &t.Key}, {"dhchap-ctrl-key", a.ControllerKey, &t.ControllerKey}} {
		switch {
		case !f.Changed(k.flag):
		case k.key == nil:
			*k.to = NoSecret
		default:
			*k.to = k.key.Text()
		}
	}
	t.Hashes, t.Groups = a.Hashes, a.Groups
	if f.Changed("dhchap-queues") {
		t.AdminOnly = &a.AdminOnly
	}
	given := t.ControllerKey != "" || t.Hashes != nil || t.Groups != nil || t.AdminOnly != nil
	switch {
	case t.Key == "" && !given:
		return t, errors.New("nothing is given to change; want --dhchap-key or another flag")
	case t.Key == NoSecret && given:
		return t, fmt.Errorf("--dhchap-key %s: the host need not authenticate then; want it without other flags", NoSecret)
	}
	return t, nil
}

// Apply returns what t makes of how a host must authenticate; nil is not at all.
func (t HostAuthText) Apply(have *target.HostAuth) (a *target.HostAuth, err error) {
	if t.Key == NoSecret {
		return nil, nil
	}
	a = &target.HostAuth{}
	if have != nil {
		*a = *have
	}
	for _, k := range []struct {
		text string
		to   **auth.Key
	}{{t.Key, &a.Key}, {t.ControllerKey, &a.ControllerKey}} {
		switch k.text {
		case "":
		case NoSecret:
			*k.to = nil
		default:
			if *k.to, err = auth.ParseKey(k.text); err != nil {
				return nil, err
			}
		}
	}
	if t.Hashes != nil {
		a.Hashes = t.Hashes
	}
	if t.Groups != nil {
		a.Groups = t.Groups
	}
	if t.AdminOnly != nil {
		a.AdminOnly = *t.AdminOnly
	}
	if a.Key == nil {
		return nil, errors.New("the host has no key so far; want --dhchap-key as well")
	}
	return a, nil
}
