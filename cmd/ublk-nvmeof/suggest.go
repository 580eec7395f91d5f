package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// checkVerb refuses a command line that names a verb that does not exist. cobra
// would complain of its flags first, which the command above does not have.
func checkVerb(root *cobra.Command, args []string) error {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	cmd, rest, err := root.Find(args)
	if err != nil || !cmd.HasSubCommands() {
		return err
	}
	name := firstWord(cmd, rest)
	if name == "" || strings.HasPrefix(name, "__") { // cobra's own
		return nil
	}
	var known []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			known = append(known, c.Name())
		}
	}
	hint := didYouMean(name, known, min(2, len(name)/2))
	if hint == "" {
		hint = "; want one of " + strings.Join(known, ", ")
	}
	return fmt.Errorf("unknown command %q for %q%s", name, cmd.CommandPath(), hint)
}

// firstWord is the first of args that is neither a flag of cmd nor the value of
// one. It is empty if there is none, or if a flag before it is unknown.
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

// flagError is the one line about a flag of cmd that does not parse.
func flagError(cmd *cobra.Command, err error) error {
	if !cmd.HasParent() {
		return fmt.Errorf("%w; flags follow the command, see %s --help", err, programName)
	}
	return fmt.Errorf("%s: %w", strings.TrimPrefix(cmd.CommandPath(), programName+" "), describeFlag(cmd, err))
}

// describeFlag names the flag, and the one that was probably meant if it does not
// exist.
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
		return fmt.Errorf("unknown flag: --%s%s", name, didYouMean("--"+name, known, max(2, len(name)/3)))
	}
	return fmt.Errorf("unknown flag: -%s%s", name, didYouMean("-"+name, known, 0))
}

// didYouMean suggests the one of known that is nearest to word, if it takes at
// most limit edits to make the one from the other, or the one that word begins
// with. Upper and lower case are the same.
func didYouMean(word string, known []string, limit int) string {
	nearest := ""
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

// edits is how many letters have to be added, removed or replaced to make b from
// a (the Levenshtein distance).
func edits(a, b string) int {
	from, to := []rune(strings.ToLower(a)), []rune(strings.ToLower(b))
	row := make([]int, len(to)+1) // distances of a prefix of from to each prefix of to
	for j := range row {
		row[j] = j
	}
	for i, x := range from {
		diagonal := row[0]
		row[0] = i + 1
		for j, y := range to {
			replaced := diagonal
			if x != y {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(to)]
}
