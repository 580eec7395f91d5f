package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// TestAPI: what other programs can import does not name types that they cannot use, and each
// package of the promise in docs/embedding.md has an example, which go test compiles and runs.
func TestAPI(t *testing.T) {
	wrong, err := checkAPI(os.DirFS("../.."), table)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wrong {
		t.Error(w)
	}
}

// TestPromise: docs/embedding.md lists the packages that promised reports.
func TestPromise(t *testing.T) {
	text, err := os.ReadFile("../../docs/embedding.md")
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(text), "<!-- promised -->")
	list, _, _ = strings.Cut(list, "<!-- end -->")
	var listed, want []string
	for line := range strings.Lines(list) {
		if name, ok := strings.CutPrefix(line, "| `"); ok {
			name, _, _ = strings.Cut(name, "`")
			listed = append(listed, name)
		}
	}
	for dir := range table {
		if promised(dir) {
			want = append(want, dir)
		}
	}
	slices.Sort(listed)
	slices.Sort(want)
	if !slices.Equal(listed, want) {
		t.Errorf("docs/embedding.md promises %v, want %v", listed, want)
	}
}

// importable reports whether other programs can import a package as a part of the library.
func importable(dir string) bool {
	first, _, _ := strings.Cut(dir, "/")
	return !slices.Contains([]string{"cmd", "bench", "docs", "internal", "examples", "e2e"}, first)
}

// promised reports whether docs/embedding.md promises that a package stays compatible. It does
// not promise it of the parts of the initiator and of the providers, nor of test suites.
func promised(dir string) bool {
	return importable(dir) && !strings.HasSuffix(dir, "test") && !slices.Contains([]string{"sq", "cq", "rdma/roce/wire", "rdma/verbs/prepare"}, dir)
}

// checkAPI returns what is wrong with the importable packages of the table.
func checkAPI(root fs.FS, table map[string]row) (wrong []string, err error) {
	for dir := range table {
		if !importable(dir) {
			continue
		}
		entries, err := fs.ReadDir(root, dir)
		if err != nil {
			return nil, err
		}
		example := false
		for _, e := range entries {
			if path.Ext(e.Name()) != ".go" {
				continue
			}
			text, err := fs.ReadFile(root, path.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			f, err := parser.ParseFile(token.NewFileSet(), e.Name(), text, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			if strings.HasSuffix(e.Name(), "_test.go") {
				example = example || hasExample(f)
				continue
			}
			for _, name := range leaks(f) {
				wrong = append(wrong, fmt.Sprintf("%s: the exported %s names a type of an internal package", path.Join(dir, e.Name()), name))
			}
		}
		if !example && promised(dir) {
			wrong = append(wrong, fmt.Sprintf("%s: the package has no example", dir))
		}
	}
	slices.Sort(wrong)
	return wrong, nil
}

func hasExample(f *ast.File) bool {
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && strings.HasPrefix(fn.Name.Name, "Example") {
			return true
		}
	}
	return false
}

// leaks returns the exported functions, methods and fields of a file whose types are of internal
// packages.
func leaks(f *ast.File) (names []string) {
	internal := map[string]bool{} // names of imported packages
	for _, i := range f.Imports {
		p, _ := strconv.Unquote(i.Path.Value) // the parser has done it, too
		if strings.HasPrefix(p, module+"/internal/") {
			internal[path.Base(p)] = true
		}
	}
	uses := func(n ast.Node) (found bool) {
		ast.Inspect(n, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				x, ok := s.X.(*ast.Ident)
				found = found || ok && internal[x.Name]
			}
			return true
		})
		return found
	}
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			public := d.Name.IsExported() && (d.Recv == nil || ast.IsExported(typeName(d.Recv.List[0].Type)))
			if public && uses(d.Type) {
				names = append(names, d.Name.Name)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				x, ok := spec.(*ast.TypeSpec)
				if !ok || !x.Name.IsExported() {
					continue
				}
				for _, field := range fieldsOf(x.Type) {
					for _, n := range field.Names {
						if n.IsExported() && uses(field.Type) {
							names = append(names, x.Name.Name+"."+n.Name)
						}
					}
				}
			}
		}
	}
	return names
}

// fieldsOf returns the fields of a structure or the methods of an interface.
func fieldsOf(t ast.Expr) []*ast.Field {
	switch x := t.(type) {
	case *ast.StructType:
		return x.Fields.List
	case *ast.InterfaceType:
		return x.Methods.List
	}
	return nil
}

func TestAPIChecker(t *testing.T) {
	table := map[string]row{"sq": {}, "nvme": {}, "cq": {}, "internal/ring": {}, "cmd/x": {}}
	text := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	got, err := checkAPI(fstest.MapFS{
		"sq/sq.go": text(`package sq
import "ublk-nvmeof/internal/ring"
type Queue struct{ Ring *ring.Ring; ring *ring.Ring }
type hidden struct{ Ring ring.Ring }
type Entries interface{ Entry() []ring.Entry }
func (*Queue) Ring() *ring.Ring { return nil }
func (*Queue) Clean(n int) { ring.Reset() }
func (*hidden) Ring() *ring.Ring { return nil }
func Make(map[string]ring.Ring) {}
func make2(ring.Ring) {}
`),
		"sq/sq_test.go":      text("package sq\nfunc ExampleQueue() {}\n"),
		"cq/cq.go":           text("package cq\n"),
		"nvme/nvme.go":       text("package nvme\n"),
		"internal/ring/r.go": text("package ring\n"),
		"cmd/x/x.go":         text("package main\n"),
	}, table)
	want := []string{
		"nvme: the package has no example",
		"sq/sq.go: the exported Entries.Entry names a type of an internal package",
		"sq/sq.go: the exported Make names a type of an internal package",
		"sq/sq.go: the exported Queue.Ring names a type of an internal package",
		"sq/sq.go: the exported Ring names a type of an internal package",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, want %q, %v", got, want, err)
	}
}
