package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// TestReference compares docs/cli.md with the program.
func TestReference(t *testing.T) {
	const file = "../../docs/cli.md"
	dir := t.TempDir()
	if err := writeDocumentation(newRoot(), dir); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(dir, "cli.md"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != string(want) {
		t.Errorf("%s differs from DIR/cli.md of \"ublk-nvmeof documentation DIR\" (%v)", file, err)
	}
}

// Each verb has a manual page that names all its flags and verbs, there is no page
// without a verb, and the shells complete every verb.
func TestDocumentation(t *testing.T) {
	dir := t.TempDir()
	var out, errs strings.Builder
	if err := execute([]string{"documentation", dir}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	pages := map[string]bool{}
	root := newRoot()
	for _, c := range documented(root) {
		file := pageName(c) + ".1"
		pages[file] = true
		text, err := os.ReadFile(filepath.Join(dir, "man", file))
		if err != nil {
			t.Error(err)
			continue
		}
		plain := strings.NewReplacer(`\-`, "-", `\e`, `\`).Replace(string(text))
		c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if want := `\fB--` + f.Name + `\fR`; !f.Hidden && !strings.Contains(plain, want) {
				t.Errorf("%s lacks --%s", file, f.Name)
			}
		})
		for _, sub := range c.Commands() {
			if len(documented(sub)) > 0 && !strings.Contains(plain, fmt.Sprintf(".BR %s (1)", pageName(sub))) {
				t.Errorf("%s does not name %s", file, sub.Name())
			}
		}
		for l := range strings.Lines(plain) {
			if request, _, _ := strings.Cut(l, " "); strings.HasPrefix(l, ".") && !strings.Contains(" .TH .SH .nf .fi .PP .TP .B .BR ", " "+strings.TrimSpace(request)+" ") {
				t.Errorf("%s: %q is no request that is meant", file, l)
			}
		}
	}
	entries, err := os.ReadDir(filepath.Join(dir, "man"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !pages[e.Name()] {
			t.Errorf("%s is of no verb", e.Name())
		}
	}
	if len(pages) < 8 {
		t.Errorf("only %d pages", len(pages))
	}
	for _, file := range []string{programName + ".bash", "_" + programName, programName + ".fish"} {
		if info, err := os.Stat(filepath.Join(dir, "completions", file)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", file, err)
		}
	}
	// The completions ask the program itself.
	var words strings.Builder
	if err := execute([]string{"__complete", ""}, &words, &errs); err != nil {
		t.Fatal(err)
	}
	for _, c := range newRoot().Commands() {
		if has := strings.Contains("\n"+words.String(), "\n"+c.Name()+"\t"); has == c.Hidden {
			t.Errorf("verb %s: completed %t, hidden %t", c.Name(), has, c.Hidden)
		}
	}
	if bash, err := exec.LookPath("bash"); err == nil {
		if out, err := exec.CommandContext(t.Context(), bash, "-n", filepath.Join(dir, "completions", programName+".bash")).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}
