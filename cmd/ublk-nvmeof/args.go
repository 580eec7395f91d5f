package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %q: want no argument", commandName(cmd), args[0])
}

// wantArgs accepts from lo to hi arguments. Their names are the words of cmd.Use after the
// name of the command.
func wantArgs(lo, hi int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		_, want, _ := strings.Cut(cmd.Use, " ")
		switch names := argNames(want); {
		case len(args) > hi:
			return fmt.Errorf("%s: %q is too much; want %s", commandName(cmd), args[hi], want)
		case len(args) >= lo:
			return nil
		case len(args) == 0:
			return fmt.Errorf("%s: no argument is given; want %s", commandName(cmd), want)
		default:
			return fmt.Errorf("%s: %s is missing; want %s", commandName(cmd), names[len(args)], want)
		}
	}
}

// argNames splits the names of arguments, such as "NSID {on | off}", at spaces outside of
// braces.
func argNames(text string) []string {
	depth := 0
	return strings.FieldsFunc(text, func(r rune) bool {
		switch r {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		}
		return r == ' ' && depth == 0
	})
}

// commandName is the name of a command with those above it, but without that of the
// program, which begins every error.
func commandName(cmd *cobra.Command) string {
	return strings.TrimPrefix(cmd.CommandPath(), programName+" ")
}
