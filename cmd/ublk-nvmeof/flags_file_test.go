package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

func TestFlagsFrom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.conf")
	read := func(text string, args ...string) (*connection, error) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := &connection{}
		cmd := &cobra.Command{}
		c.addFlags(cmd)
		if err := cmd.Flags().Parse(args); err != nil {
			t.Fatal(err)
		}
		return c, flagsFrom(path, cmd.Flags())
	}
	c, err := read("# a comment\n\n traddr = 192.0.2.1 \nnqn=nqn.x\nduplicate-connect = true\nretry = 90s\ntrsvcid = 4421", "--trsvcid=4422")
	if err != nil || c.opts.Address != "192.0.2.1" || c.opts.NQN != "nqn.x" || !c.opts.Duplicate || c.retry.Seconds() != 90 {
		t.Errorf("%+v, %v", c, err)
	}
	if c.opts.Port != 4422 {
		t.Errorf("port %d, want that of the command line", c.opts.Port)
	}
	if got := options.Args(c.shown); len(got) != 4 { // a recovery starts with them
		t.Errorf("arguments %q", got)
	}
	for text, want := range map[string]string{
		"nqn = a\nnqn = b":  ":2: nqn is given twice",
		"nqn":               `:1: "nqn": want FLAG = VALUE`,
		"--nqn = x":         `:1: "--nqn": want the long name of a flag of connect, without hyphens in front`,
		"n = x":             `:1: "n": want the long name of a flag of connect, without hyphens in front`,
		"\nforeground=true": `:2: "foreground": want the long name of a flag of connect, without hyphens in front`,
	} {
		if _, err := read(text); err == nil || err.Error() != path+want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	if err := flagsFrom("/dev/zero", nil); err == nil || !strings.Contains(err.Error(), "--flags-from: /dev/zero: it is a device") {
		t.Error(err)
	}
	if _, err := read("trsvcid = 0"); err == nil {
		t.Error("an invalid value is accepted")
	}
}
