package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// checkVerb returns an error if a command line names an unknown verb. Without it, cobra
// would first complain about the flags of that verb, which the command above does not
// have.
func checkVerb(root *cobra.Command, args []string) error {
	if root.CompletionOptions.DisableDefaultCmd { // rootFor knows the verb
		return nil
	}
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	cmd, rest, err := root.Find(args)
	if err != nil || !cmd.HasSubCommands() {
		return err
	}
	name := firstWord(cmd, rest)
	if name == "" || strings.HasPrefix(name, "__") { // an internal command of cobra
		return nil
	}
	var known []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			known = append(known, c.Name())
		}
	}
	hint := didYouMean(name, known)
	if hint == "" {
		hint = "; want one of " + strings.Join(known, ", ")
	}
	return fmt.Errorf("unknown command %q for %q%s", name, cmd.CommandPath(), hint)
}

// firstWord returns the first of args that is neither a flag of cmd nor the value of a
// flag. It returns "" if there is none, or if a flag before it is unknown.
func firstWord(cmd *cobra.Command, args []string) string {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			return arg
		}
		name, _, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		f := cmd.Flag(name)
		switch {
		case name == "help" || name == "h":
		case f == nil:
			return ""
		case !hasValue && f.NoOptDefVal == "" && len(args) > 0:
			args = args[1:]
		}
	}
	return ""
}

// flagError returns the error, of one line, for a flag of cmd that cannot be parsed.
func flagError(cmd *cobra.Command, err error) error {
	err = describeFlag(cmd, err)
	if !cmd.HasParent() {
		return fmt.Errorf("%w; the flags of a command follow its name, see %s --help", err, programName)
	}
	return fmt.Errorf("%s: %w", commandName(cmd), err)
}

// describeFlag adds the name of the flag to an error. If the flag does not exist, it
// adds the one that was probably meant.
func describeFlag(cmd *cobra.Command, err error) error {
	var missing *pflag.NotExistError
	if !errors.As(err, &missing) {
		return options.FlagError(err)
	}
	var known []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		switch {
		case f.Hidden:
		case missing.GetSpecifiedShortnames() == "":
			known = append(known, "--"+f.Name)
		case f.Shorthand != "":
			known = append(known, "-"+f.Shorthand)
		}
	})
	name := missing.GetSpecifiedName()
	if missing.GetSpecifiedShortnames() == "" {
		return fmt.Errorf("unknown flag: --%s%s", name, didYouMean("--"+name, known))
	}
	return fmt.Errorf("unknown flag: -%s%s", name, didYouMean("-"+name, known))
}

// didYouMean suggests the one of known that is most similar to word, if it is similar
// enough, or one that word begins with. Case does not matter.
func didYouMean(word string, known []string) string {
	nearest, limit := "", near(word)
	for _, k := range known {
		if d := edits(word, k); d <= limit {
			nearest, limit = k, d-1
		}
	}
	for _, k := range known {
		if nearest == "" && strings.HasPrefix(word, k+"-") {
			nearest = k
		}
	}
	if nearest == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", nearest)
}

// near returns the largest number of edits between word and another word that was
// probably meant.
func near(word string) int {
	switch n := len(strings.TrimLeft(word, "-")); {
	case n < 2:
		return 0
	case n < 6:
		return 1
	case n < 12:
		return 2
	}
	return 3
}

// edits returns how many letters must be added, removed, replaced or swapped with a
// neighbor to turn a into b (optimal string alignment distance).
func edits(a, b string) int {
	from, to := []rune(strings.ToLower(a)), []rune(strings.ToLower(b))
	d := make([][]int, len(from)+1) // distances of each prefix of from to each prefix of to
	for i := range d {
		d[i] = make([]int, len(to)+1)
		d[i][0] = i
	}
	for j := range to {
		d[0][j+1] = j + 1
	}
	for i, x := range from {
		for j, y := range to {
			replaced := d[i][j]
			if x != y {
				replaced++
			}
			d[i+1][j+1] = min(replaced, d[i][j+1]+1, d[i+1][j]+1)
			if i > 0 && j > 0 && x == to[j-1] && y == from[i-1] {
				d[i+1][j+1] = min(d[i+1][j+1], d[i-1][j-1]+1)
			}
		}
	}
	return d[len(from)][len(to)]
}
