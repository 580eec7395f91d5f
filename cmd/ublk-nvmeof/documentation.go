package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newDocumentation returns the command that a package is made with.
func newDocumentation() *cobra.Command {
	return &cobra.Command{
		Use:    "documentation DIR",
		Hidden: true,
		Short:  "Write manual pages, shell completions and the reference of the command line",
		Long: `Writes a manual page for each verb to DIR/man, completions for bash, zsh and fish to
DIR/completions, and the reference of the command line to DIR/cli.md.`,
		Args: cobra.ExactArgs(1),
		RunE: verb("documentation", func(cmd *cobra.Command, args []string) error {
			return writeDocumentation(cmd.Root(), args[0])
		}),
	}
}

// writeDocumentation writes the files of newDocumentation.
func writeDocumentation(root *cobra.Command, dir string) error {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	man, completions := filepath.Join(dir, "man"), filepath.Join(dir, "completions")
	if err := errors.Join(os.MkdirAll(man, 0o755), os.MkdirAll(completions, 0o755)); err != nil {
		return err
	}
	for _, c := range documented(root) {
		if err := os.WriteFile(filepath.Join(man, pageName(c)+".1"), manual(c), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "cli.md"), reference(root), 0o644),
		root.GenBashCompletionFileV2(filepath.Join(completions, programName+".bash"), true),
		root.GenZshCompletionFile(filepath.Join(completions, "_"+programName)),
		root.GenFishCompletionFile(filepath.Join(completions, programName+".fish"), true),
	)
}

// documented returns a command and all below it that have a manual page.
func documented(c *cobra.Command) []*cobra.Command {
	if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
		return nil
	}
	all := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		all = append(all, documented(sub)...)
	}
	return all
}

// pageName returns the name of a command's manual page, such as ublk-nvmeof-connect.
func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// manual returns the manual page of a command for man(7).
func manual(c *cobra.Command) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, ".TH %s 1 \"\" \"%s %s\" \"User Commands\"\n", quoted(strings.ToUpper(pageName(c))), programName, roff(thisBuild().Version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(pageName(c)), roff(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.nf\n%s\n", roff(c.UseLine()))
	if c.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "%s\n", roff(c.CommandPath()+" VERB [flags]"))
	}
	b.WriteString(".fi\n.SH DESCRIPTION\n")
	long := c.Long
	if long == "" {
		long = c.Short + "."
	}
	text(&b, long)
	if c.HasAvailableSubCommands() {
		b.WriteString(".SH VERBS\n")
		for _, sub := range c.Commands() {
			if len(documented(sub)) > 0 {
				fmt.Fprintf(&b, ".TP\n.B %s\n%s. See\n.BR %s (1).\n", roff(sub.Name()), roff(sub.Short), roff(pageName(sub)))
			}
		}
	}
	if c.NonInheritedFlags().HasAvailableFlags() {
		b.WriteString(".SH OPTIONS\n")
		c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) { option(&b, f) })
	}
	if c.HasParent() {
		fmt.Fprintf(&b, ".SH EXIT STATUS\n.BR %s (1)\nlists the exit codes.\n", roff(programName))
		fmt.Fprintf(&b, ".SH SEE ALSO\n.BR %s (1)\n", roff(pageName(c.Parent())))
	} else {
		b.WriteString(".SH SEE ALSO\n.BR nvme-connect (1),\n.BR systemd.mount (5)\n")
	}
	return b.Bytes()
}

// reference returns docs/cli.md.
func reference(root *cobra.Command) []byte {
	var b bytes.Buffer
	b.WriteString("# Command line\n\n`ublk-nvmeof VERB --help` shows the same. This page is made from the program.\n")
	for _, c := range documented(root) {
		fmt.Fprintf(&b, "\n## %s\n\n```text\n%s\n\n%s\n", c.CommandPath(), strings.TrimSpace(cmp.Or(c.Long, c.Short)), c.UseLine())
		if flags := c.NonInheritedFlags().FlagUsagesWrapped(referenceWidth); flags != "" {
			fmt.Fprintf(&b, "\n%s", flags)
		}
		b.WriteString("```\n")
	}
	return b.Bytes()
}

// referenceWidth is the number of columns of the reference.
const referenceWidth = 110

// option writes a flag with its default.
func option(b *bytes.Buffer, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	value, usage := pflag.UnquoteUsage(f)
	b.WriteString(".TP\n")
	if f.Shorthand != "" {
		fmt.Fprintf(b, "\\fB\\-%s\\fR, ", f.Shorthand)
	}
	fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", roff(f.Name))
	if value != "" {
		fmt.Fprintf(b, " \\fI%s\\fR", roff(value))
	}
	fmt.Fprintf(b, "\n%s", line(usage))
	if d := f.DefValue; d != "" && d != "false" && d != "[]" && !strings.Contains(usage, "(default") {
		fmt.Fprintf(b, " (default %s)", roff(d))
	}
	b.WriteString("\n")
}

// text writes paragraphs. Lines that begin with blanks are written as they are.
func text(b *bytes.Buffer, s string) {
	fixed := false
	for l := range strings.SplitSeq(strings.TrimSpace(s), "\n") {
		indented := strings.HasPrefix(l, " ") || strings.HasPrefix(l, "\t")
		switch {
		case indented && !fixed:
			b.WriteString(".nf\n")
		case !indented && fixed:
			b.WriteString(".fi\n")
		}
		fixed = indented
		if l == "" {
			b.WriteString(".PP\n")
			continue
		}
		b.WriteString(line(l) + "\n")
	}
	if fixed {
		b.WriteString(".fi\n")
	}
}

// line escapes a line of text, which must not look like a request.
func line(s string) string {
	s = roff(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		return `\&` + s
	}
	return s
}

// roff escapes text.
func roff(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
}

// quoted makes text one argument of a request.
func quoted(s string) string { return `"` + strings.ReplaceAll(roff(s), `"`, `""`) + `"` }
