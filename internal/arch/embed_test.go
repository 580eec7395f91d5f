package arch

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEmbedding builds the program of docs/embedding.md with the lines for go.mod that it
// gives. The program must need no other module than golang.org/x/sys.
func TestEmbedding(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs/embedding.md"))
	if err != nil {
		t.Fatal(err)
	}
	block := func(language, begin string) string {
		for _, part := range strings.Split(string(text), "```")[1:] {
			if code, ok := strings.CutPrefix(part, language+"\n"); ok && strings.HasPrefix(code, begin) {
				return code
			}
		}
		t.Fatalf("docs/embedding.md has no block that begins with %q", begin)
		return ""
	}
	dir := t.TempDir()
	sums, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"go.mod": "module example.org/embedder\n\ngo 1.26.0\n\n" + strings.Replace(block("", "require"), "../ublk-nvmeof", root, 1),
		"go.sum": string(sums),
		"main.go": "package main\n\nimport (\n\t\"context\"\n\n\t\"ublk-nvmeof/disk\"\n)\n\nfunc read(ctx context.Context, p []byte) error {\n" +
			block("go", "d, err") + "\t_ = n\n\treturn err\n}\n\nfunc main() { _ = read }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOFLAGS=-mod=mod", "GOPROXY=off", "GOWORK=off")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	run("vet", ".")
	for dep := range strings.FieldsSeq(run("list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", ".")) {
		if dep != "example.org/embedder" && dep != module && dep != sys {
			t.Errorf("the program needs module %s", dep)
		}
	}
}
