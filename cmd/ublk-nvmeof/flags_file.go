package main

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// notInFile are the flags that make no sense in a file of flags.
var notInFile = map[string]bool{"flags-from": true, "foreground": true, "help": true, "run-dir": true}

// flagsFrom sets flags from a file, unless they are set already. Each line of the file is
// the long name of a flag, an equals sign, and a value that extends to the end of the line.
// Blank lines and lines that begin with # are comments.
func flagsFrom(path string, f *pflag.FlagSet) error {
	text, err := options.ReadFile(path)
	if err != nil {
		return fmt.Errorf("--flags-from: %w", err)
	}
	inFile := map[string]bool{}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		flag := f.Lookup(name)
		switch {
		case !ok:
			return fmt.Errorf("%s:%d: %q: want FLAG = VALUE", path, n, line)
		case flag == nil || notInFile[name]:
			return fmt.Errorf("%s:%d: %q: want the long name of a flag of connect, without hyphens in front", path, n, name)
		case inFile[name]:
			return fmt.Errorf("%s:%d: %s is given twice", path, n, name)
		case !flag.Changed:
			if err := f.Set(name, value); err != nil {
				return fmt.Errorf("%s:%d: %w", path, n, err)
			}
		}
		inFile[name] = true
	}
	return nil
}
