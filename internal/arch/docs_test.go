package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// TestDocs looks for the code that the documents name.
func TestDocs(t *testing.T) {
	root := os.DirFS("../..")
	wrong, err := checkDocs(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wrong {
		t.Error(w)
	}
}

// names is what the Go sources of a tree declare or spell.
type names struct {
	idents map[string]bool // declared at any level, and string literals that are identifiers
	// qualified is what is declared with what it belongs to: "package.Name",
	// "Type.member" and "package.Type.member". A package is the last part of its
	// directory.
	qualified map[string]bool
	tests     map[string]bool // "package TestName" and "TestName"
}

var (
	codeSpan   = regexp.MustCompile("`([^`\n]+)`")
	testName   = regexp.MustCompile(`^([a-z0-9]+ )?Test[A-Z]\w*$`)
	identifier = regexp.MustCompile(`^[A-Za-z]\w*$`)
	qualified  = regexp.MustCompile(`^[A-Za-z]\w*(\.[A-Za-z]\w*)+$`)
	mixedCase  = regexp.MustCompile(`^([a-z]+[a-z0-9]*[A-Z]|[A-Z][a-z])[A-Za-z0-9]*$`)
	otherFile  = regexp.MustCompile(`\.(c|h|json|sock|log)$`)
	sourceFile = regexp.MustCompile(`^([a-z0-9_.-]+/)*[A-Za-z0-9_-]+\.(go|sh|md|txtar)$`)
)

// checkDocs returns what the documents of a tree name in `code` and the tree does
// not have: tests ("poller TestSplit"), files, and identifiers with a package, a
// type or capital letters inside. Other code may be a command or the kernel's.
func checkDocs(root fs.FS) ([]string, error) {
	known, err := namesOf(root)
	if err != nil {
		return nil, err
	}
	var wrong []string
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && (d.Name() == "build" || d.Name() == "results" || strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case d.IsDir() || path.Ext(name) != ".md":
			return nil
		}
		text, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		for i, line := range strings.Split(string(text), "\n") {
			for _, span := range codeSpan.FindAllStringSubmatch(line, -1) {
				if !known.has(root, path.Dir(name), span[1]) {
					wrong = append(wrong, fmt.Sprintf("%s:%d: there is no `%s`", name, i+1, span[1]))
				}
			}
		}
		return nil
	})
	return wrong, err
}

// has says whether the code that a document in dir names exists, as far as that
// can be said.
func (n *names) has(root fs.FS, dir, code string) bool {
	switch {
	case testName.MatchString(code):
		return n.tests[code]
	case sourceFile.MatchString(code):
		return exists(root, code) || exists(root, path.Join(dir, code)) || exists(root, path.Join("e2e/testdata", code))
	case otherFile.MatchString(code):
	case qualified.MatchString(code) && !strings.Contains(code, "_"):
		return n.qualified[code]
	case mixedCase.MatchString(code):
		return n.idents[code]
	}
	return true
}

func exists(root fs.FS, name string) bool {
	_, err := fs.Stat(root, name)
	return err == nil
}

func namesOf(root fs.FS) (*names, error) {
	n := &names{idents: map[string]bool{}, qualified: map[string]bool{}, tests: map[string]bool{}}
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && (d.Name() == "build" || strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case path.Ext(name) == ".go":
			return n.add(root, name)
		}
		return nil
	})
	return n, err
}

func (n *names) add(root fs.FS, name string) error {
	src, err := fs.ReadFile(root, name)
	if err != nil {
		return err
	}
	f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	pkg := path.Base(path.Dir(name))
	for _, decl := range f.Decls {
		n.declare(pkg, decl)
	}
	ast.Inspect(f, func(node ast.Node) bool {
		switch x := node.(type) {
		case *ast.Field:
			for _, id := range x.Names {
				n.idents[id.Name] = true
			}
		case *ast.BasicLit:
			if s, err := strconv.Unquote(x.Value); err == nil && identifier.MatchString(s) {
				n.idents[s] = true
			}
		}
		return true
	})
	return nil
}

// declare notes what a declaration of a package adds.
func (n *names) declare(pkg string, decl ast.Decl) {
	top := func(name string) { n.idents[name], n.qualified[pkg+"."+name] = true, true }
	member := func(of, name string) {
		n.idents[name], n.qualified[of+"."+name], n.qualified[pkg+"."+of+"."+name] = true, true, true
	}
	switch d := decl.(type) {
	case *ast.FuncDecl:
		switch {
		case d.Recv != nil:
			member(typeName(d.Recv.List[0].Type), d.Name.Name)
		default:
			top(d.Name.Name)
			n.tests[d.Name.Name], n.tests[pkg+" "+d.Name.Name] = true, true
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch x := spec.(type) {
			case *ast.ValueSpec:
				for _, id := range x.Names {
					top(id.Name)
				}
			case *ast.TypeSpec:
				top(x.Name.Name)
				for _, id := range members(x.Type) {
					member(x.Name.Name, id.Name)
				}
			}
		}
	}
}

// members are the fields of a structure and the methods of an interface.
func members(t ast.Expr) (out []*ast.Ident) {
	var list *ast.FieldList
	switch x := t.(type) {
	case *ast.StructType:
		list = x.Fields
	case *ast.InterfaceType:
		list = x.Methods
	default:
		return nil
	}
	for _, f := range list.List {
		out = append(out, f.Names...)
	}
	return out
}

// typeName is the name of the type of a receiver.
func typeName(t ast.Expr) string {
	switch x := t.(type) {
	case *ast.StarExpr:
		return typeName(x.X)
	case *ast.IndexExpr:
		return typeName(x.X)
	case *ast.IndexListExpr:
		return typeName(x.X)
	case *ast.Ident:
		return x.Name
	}
	return ""
}

func TestDocsChecker(t *testing.T) {
	text := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	got, err := checkDocs(fstest.MapFS{
		"sq/sq.go":               text("package sq\ntype Queue struct{ depth int }\nfunc (q *Queue) Flush() {}\nfunc makeRoom() {}\n"),
		"sq/sq_test.go":          text("package sq\nfunc TestFull() {}\n"),
		"rdma/roce/x_test.go":    text("package roce\nfunc TestLoss() { run(\"CloseTwice\") }\n"),
		"e2e/testdata/nbd.txtar": text(""),
		"e2e/README.md":          text("`lab.sh` `testdata/*.txtar` `other.sh`"),
		"e2e/lab.sh":             text(""),
		"README.md": text("`sq TestFull` `roce TestLoss` `TestLoss` `CloseTwice` `sq.Queue.Flush` `Queue.depth` `makeRoom` `nbd.txtar` `e2e/lab.sh`\n" +
			"`rxe_comp.c` `mad.c` `state.json` `blk_mq_init` `list -v` `ublk` `--flag` `MDTS` `10.0.2.15`\n" +
			"`roce TestFull` `TestGone` `sq.Queue.Gone` `madeRoom` `OpenTwice` `gone.txtar` `e2e/gone.sh`\n"),
	})
	want := []string{
		"README.md:3: there is no `roce TestFull`", "README.md:3: there is no `TestGone`", "README.md:3: there is no `sq.Queue.Gone`",
		"README.md:3: there is no `madeRoom`", "README.md:3: there is no `OpenTwice`", "README.md:3: there is no `gone.txtar`",
		"README.md:3: there is no `e2e/gone.sh`", "e2e/README.md:1: there is no `other.sh`",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, got %q, want %q", err, got, want)
	}
}
