package options

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// pathFlags are the flags that may differ between the connects that add paths to one server: they
// say where a path leads, or are about the command only. Keys are compared by the server.
var pathFlags = []string{
	"transport", "traddr", "trsvcid", "nqn", "hostnqn", "host-traddr", "host-iface", "path",
	"duplicate-connect", "load-modules", "timeout",
}

// Difference is a flag whose value is not that of a server.
type Difference struct {
	Flag  string // as messages name it
	Given string
	Has   string // the value of the server

	name string
}

// Differences compares the flags that were set in f with those of a server, which was started with
// args and goes on with its own. The flags that say where a path leads are not compared. chosen has
// what the server has chosen where its flag is auto.
func Differences(f *pflag.FlagSet, args []string, chosen map[string]string) ([]Difference, error) {
	server := Default()
	has := pflag.NewFlagSet("", pflag.ContinueOnError)
	server.AddFlags(has)
	if err := has.Parse(args); err != nil {
		return nil, fmt.Errorf("flags of the server: %w", FlagError(err))
	}
	server.normalize()
	var out []Difference
	f.VisitAll(func(flag *pflag.Flag) {
		if !flag.Changed || isSecret(flag) || slices.Contains(pathFlags, flag.Name) {
			return
		}
		of := has.Lookup(flag.Name)
		if of == nil {
			return // it is not a flag of a server
		}
		given, have := flag.Value.String(), of.Value.String()
		if choice := chosen[flag.Name]; choice != "" && (given == Auto || have == Auto) {
			if given == Auto || given == choice {
				return
			}
			have = choice
		}
		if !strings.EqualFold(given, have) { // a UUID may be in capitals
			out = append(out, Difference{flagName(flag), given, have, flag.Name})
		}
	})
	return out, nil
}

// Explain says what is wrong with a flag for a server with a name, and what changes it.
func (d Difference) Explain(server string) string {
	has := d.Has
	if has == "" {
		has = "none"
	}
	remedy := "disconnect and connect change it"
	switch d.name {
	case "policy":
		remedy = fmt.Sprintf("\"policy %s --policy %s\" changes it", server, d.Given)
	case "preferred":
		remedy = fmt.Sprintf("\"policy %s --policy preferred --preferred %s\" changes it", server, d.Given)
	}
	return fmt.Sprintf("%s %q: %s has %s; %s", d.Flag, d.Given, server, has, remedy)
}
