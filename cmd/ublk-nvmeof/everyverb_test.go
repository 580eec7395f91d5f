package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
)

// used is what scenarios use of the command tree.
type used struct {
	root  *cobra.Command
	verbs map[*cobra.Command]bool
	flags map[*pflag.Flag]bool
}

// newUsed reads the scenarios of some directories.
func newUsed(t *testing.T, dirs ...string) *used {
	t.Helper()
	u := &used{root: newRoot(), verbs: map[*cobra.Command]bool{}, flags: map[*pflag.Flag]bool{}}
	u.root.InitDefaultCompletionCmd()
	u.root.InitDefaultHelpCmd()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d scenarios, %v", dir, len(files), err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				for _, args := range commandLines(line) {
					u.add(args)
				}
			}
		}
	}
	return u
}

// commandLines returns the arguments of each call of the program in a line of a scenario, or
// of a shell script in it.
func commandLines(line string) (all [][]string) {
	if strings.HasPrefix(strings.TrimSpace(line), "#") {
		return nil
	}
	var call []string
	inside := false
	end := func() {
		if inside {
			all = append(all, call)
		}
		call, inside = nil, false
	}
	for _, w := range words(line) {
		switch {
		case inside && slices.Contains([]string{"|", "||", "&&", "&", ";", ">", ">&2", "2>&1", "then", "do"}, w):
			end()
		case inside:
			call = append(call, strings.TrimSuffix(w, ";"))
			if strings.HasSuffix(w, ";") {
				end()
			}
		case strings.HasSuffix(w, programName): // also $(ublk-nvmeof
			inside = true
		case strings.Contains(w, programName+" "): // a script that is one argument
			all = append(all, commandLines(w)...)
		}
	}
	end()
	return all
}

// words splits a line at spaces outside quotes.
func words(line string) (all []string) {
	var word strings.Builder
	var quote rune
	begun := false
	end := func() {
		if begun {
			all = append(all, word.String())
		}
		word.Reset()
		begun = false
	}
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, begun = r, true
		case quote == 0 && strings.ContainsRune(" \t\n", r):
			end()
		default:
			word.WriteRune(r)
			begun = true
		}
	}
	end()
	return all
}

// add notes the verb and the flags of a call.
func (u *used) add(args []string) {
	cmd, rest, err := u.root.Find(args)
	if err != nil {
		return // a scenario about an unknown verb
	}
	for c := cmd; c != nil; c = c.Parent() {
		u.verbs[c] = true
	}
	cmd.InitDefaultHelpFlag()
	take := func(f *pflag.Flag) (valued bool) {
		if f == nil {
			return false // a scenario about an unknown flag
		}
		u.flags[f] = true
		return f.NoOptDefVal == ""
	}
	for len(rest) > 0 {
		arg := rest[0]
		rest = rest[1:]
		skip := false
		switch name, long := strings.CutPrefix(arg, "--"); {
		case long && name == "":
			return
		case long:
			name, _, hasValue := strings.Cut(name, "=")
			skip = take(cmd.Flag(name)) && !hasValue
		case len(arg) > 1 && arg[0] == '-':
			for i := 1; i < len(arg); i++ {
				if take(u.short(cmd, arg[i:i+1])) {
					skip = i == len(arg)-1
					break
				}
			}
		}
		if skip && len(rest) > 0 {
			rest = rest[1:]
		}
	}
}

// short finds a flag by its letter.
func (*used) short(cmd *cobra.Command, letter string) *pflag.Flag {
	if f := cmd.Flags().ShorthandLookup(letter); f != nil {
		return f
	}
	return cmd.InheritedFlags().ShorthandLookup(letter)
}

// TestScenariosHaveEveryVerb: each verb and each flag of the program, hidden ones too, is in
// a scenario of this package or of e2e.
func TestScenariosHaveEveryVerb(t *testing.T) {
	u := newUsed(t, "testdata", "../../e2e/testdata")
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Name() == "serve" {
			return // nobody but connect, recover and upgrade calls it
		}
		if !u.verbs[cmd] {
			t.Errorf("no scenario has %q", cmd.CommandPath())
		}
		cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			switch {
			case u.flags[f]:
			case f.Name == "help": // cobra's, the same for all verbs
			case strings.HasSuffix(f.Name, "-fd") && f.Hidden: // this program gives it to itself
			default:
				t.Errorf("no scenario has %q --%s", cmd.CommandPath(), f.Name)
			}
		})
		for _, c := range cmd.Commands() {
			visit(c)
		}
	}
	visit(u.root)
}

// TestSchemaOfEveryVerb: what a verb writes as JSON has a schema, which the tests of package
// output hold against the golden files.
func TestSchemaOfEveryVerb(t *testing.T) {
	const connects, silent = "connect", ""
	others := map[string]string{
		"recover": connects, "upgrade": connects, // they show the new server as connect does
		"target": "target-list",                                                   // that of the target that has started
		"reset":  silent, "ns-rescan": silent, "reauth": silent, "policy": silent, // they write nothing
		"resv-register": silent, "resv-acquire": silent, "resv-release": silent, // one line of text, as nvme-cli
	}
	verbs := 0
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		for _, c := range cmd.Commands() {
			visit(c)
		}
		if f := cmd.Flags().Lookup("output-format"); f == nil || cmd.Hidden || !strings.Contains(f.Value.Type(), output.JSON) {
			return
		}
		verbs++
		name := strings.ReplaceAll(strings.TrimPrefix(cmd.CommandPath(), programName+" "), " ", "-")
		if other, ok := others[name]; ok {
			name = other
		}
		if name == silent {
			return
		}
		if _, err := os.Stat("../../docs/schema/" + name + ".json"); err != nil {
			t.Errorf("%s: %v", cmd.CommandPath(), err)
		}
	}
	visit(newRoot())
	if verbs < 25 {
		t.Errorf("%d verbs with JSON", verbs)
	}
}
