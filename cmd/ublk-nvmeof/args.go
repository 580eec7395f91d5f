package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// noArgs returns an error if there are arguments.
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
			return fmt.Errorf("%s: %q is one argument too many; want %s", commandName(cmd), args[hi], want)
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

// commandName returns the name of a command and of the commands above it. It leaves out
// the name of the program, with which every error begins.
func commandName(cmd *cobra.Command) string {
	return strings.TrimPrefix(cmd.CommandPath(), programName+" ")
}
