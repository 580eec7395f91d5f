package arch

import (
	"fmt"
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

func TestArrows(t *testing.T) {
	root := os.DirFS("../..")
	if _, err := fs.Stat(root, "go.mod"); err != nil {
		t.Fatalf("this is not the root of the module: %v", err)
	}
	found, violations, err := check(root, table)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range append(violations, absent(table, found)...) {
		t.Error(v)
	}
	if len(found) < 10 {
		t.Errorf("only %d packages were found", len(found))
	}
}

// absent complains of packages that the table has and the module has not.
func absent(table map[string]row, found map[string]bool) []string {
	var violations []string
	for dir := range table {
		if !found[dir] {
			violations = append(violations, fmt.Sprintf("%s: the package is in the table of internal/arch and does not exist", dir))
		}
	}
	slices.Sort(violations)
	return violations
}

func TestAbsentPackages(t *testing.T) {
	got := absent(map[string]row{"sq": {}, "cq": {}, "block/blocktest": {}}, map[string]bool{"sq": true, "util": true})
	want := []string{
		"block/blocktest: the package is in the table of internal/arch and does not exist",
		"cq: the package is in the table of internal/arch and does not exist",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// check parses every Go file below root, whatever its build constraints say. It
// returns the packages that it found and what the table does not allow. Modules
// of their own (a go.mod below root), testdata and hidden directories are left
// out, as the go command does.
func check(root fs.FS, table map[string]row) (found map[string]bool, violations []string, err error) {
	dirs := map[string]bool{}
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return skip(root, name)
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		dir := path.Dir(name)
		r, listed := table[dir]
		if !dirs[dir] {
			dirs[dir] = true
			if !listed {
				violations = append(violations, fmt.Sprintf("%s: the package is not in the table of internal/arch", dir))
			}
		}
		if !listed {
			return nil
		}
		imports, err := importsOf(root, name)
		if err != nil {
			return err
		}
		test := strings.HasSuffix(name, "_test.go")
		for _, imp := range imports {
			if !allowed(dir, imp, r, test) {
				violations = append(violations, fmt.Sprintf("%s: package %s must not import %s", name, dir, imp))
			}
		}
		return nil
	})
	return dirs, violations, err
}

func skip(root fs.FS, dir string) error {
	if dir == "." {
		return nil
	}
	base := path.Base(dir)
	if base == "testdata" || base == "vendor" || base[0] == '.' || base[0] == '_' || dir == "build" {
		return fs.SkipDir
	}
	if _, err := fs.Stat(root, path.Join(dir, "go.mod")); err == nil {
		return fs.SkipDir
	}
	return nil
}

func importsOf(root fs.FS, name string) ([]string, error) {
	src, err := fs.ReadFile(root, name)
	if err != nil {
		return nil, err
	}
	f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	var imports []string
	for _, spec := range f.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		imports = append(imports, p)
	}
	return imports, nil
}

// allowed says whether a file of package dir may import imp.
func allowed(dir, imp string, r row, test bool) bool {
	may := r.may
	if test {
		may = slices.Concat(r.may, r.testing, []string{dir, testenv})
	}
	if own, ok := strings.CutPrefix(imp, module+"/"); ok {
		return slices.Contains(may, own)
	}
	first, _, _ := strings.Cut(imp, "/")
	if !strings.Contains(first, ".") {
		return true // the standard library
	}
	return slices.ContainsFunc(may, func(m string) bool {
		return imp == m || strings.HasPrefix(imp, m+"/")
	})
}

func file(imports ...string) *fstest.MapFile {
	var b strings.Builder
	b.WriteString("package p\n")
	for _, i := range imports {
		fmt.Fprintf(&b, "import _ %q\n", i)
	}
	return &fstest.MapFile{Data: []byte(b.String())}
}

// The checker finds what is planted, and nothing else.
func TestCheckerFindsViolations(t *testing.T) {
	table := map[string]row{
		"sq": {may: []string{"rdma"}, testing: []string{"rdma/rdmatest"}},
		"cq": {may: []string{"rdma", sys}}, "rdma": {}, "rdma/rdmatest": {may: []string{"rdma"}},
	}
	constrained := func(constraint string, imports ...string) *fstest.MapFile {
		f := file(imports...)
		f.Data = append([]byte("//go:build "+constraint+"\n\n"), f.Data...)
		return f
	}
	for name, tt := range map[string]struct {
		files fstest.MapFS
		want  []string
	}{
		"clean": {fstest.MapFS{
			"sq/sq.go":            file("fmt", "net/netip", "C", module+"/rdma"),
			"sq/sq_test.go":       file(module+"/rdma/rdmatest", module+"/sq"),
			"cq/cq.go":            file(sys+"/unix", sys+"/cpu"),
			"rdma/rdma.go":        file(),
			"build/x.go":          file(module + "/sq"),
			"sq/testdata/x.go":    file(module + "/cq"),
			"e2e/go.mod":          {Data: []byte("module e2e\n")},
			"e2e/vm/vm.go":        file("example.org/x"),
			"rdma/rdmatest/t.go":  file("testing", module+"/rdma"),
			".hidden/x.go":        file(module + "/cq"),
			"rdma/shim.c":         {Data: []byte("import nothing")},
			"rdma/rdmatest/ab.md": {Data: []byte("text")},
		}, nil},
		"forbidden package of ours": {
			fstest.MapFS{"sq/sq.go": file(module + "/cq")},
			[]string{"sq/sq.go: package sq must not import ublk-nvmeof/cq"},
		},
		"in a test": {
			fstest.MapFS{"sq/sq_test.go": file(module + "/cq")},
			[]string{"sq/sq_test.go: package sq must not import ublk-nvmeof/cq"},
		},
		"test import outside a test": {
			fstest.MapFS{"sq/sq.go": file(module + "/rdma/rdmatest")},
			[]string{"sq/sq.go: package sq must not import ublk-nvmeof/rdma/rdmatest"},
		},
		"foreign module": {
			fstest.MapFS{"rdma/rdma.go": file(sys + "/unix")},
			[]string{"rdma/rdma.go: package rdma must not import golang.org/x/sys/unix"},
		},
		"foreign module of a similar name": {
			fstest.MapFS{"cq/cq.go": file(sys + "tem/unix")},
			[]string{"cq/cq.go: package cq must not import golang.org/x/system/unix"},
		},
		"other operating system": {
			fstest.MapFS{"rdma/rdma_windows.go": file(module + "/sq")},
			[]string{"rdma/rdma_windows.go: package rdma must not import ublk-nvmeof/sq"},
		},
		"without cgo": {
			fstest.MapFS{"rdma/stub.go": constrained("!cgo", module+"/cq")},
			[]string{"rdma/stub.go: package rdma must not import ublk-nvmeof/cq"},
		},
		"ignored by the build": {
			fstest.MapFS{"rdma/gen.go": constrained("ignore", module+"/cq")},
			[]string{"rdma/gen.go: package rdma must not import ublk-nvmeof/cq"},
		},
		"package missing from the table": {
			fstest.MapFS{"util/a.go": file(), "util/b.go": file(module + "/sq")},
			[]string{"util: the package is not in the table of internal/arch"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, got, err := check(tt.files, table)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// A file that does not parse is an error, not a file without imports.
func TestCheckerReportsSyntaxErrors(t *testing.T) {
	_, _, err := check(fstest.MapFS{"sq/sq.go": {Data: []byte("pakage sq")}}, map[string]row{"sq": {}})
	if err == nil {
		t.Error("no error")
	}
}

// What the table promises beyond single imports.
func TestTable(t *testing.T) {
	all := func(pkg string) []string { return slices.Concat(table[pkg].may, table[pkg].testing) }
	if slices.Contains(all("sq"), "cq") || slices.Contains(all("cq"), "sq") {
		t.Error("sq and cq see each other")
	}
	for pkg, r := range table {
		for _, imp := range slices.Concat(r.may, r.testing) {
			outside := strings.Contains(strings.Split(imp, "/")[0], ".")
			switch _, listed := table[imp]; {
			case outside && imp != sys && !strings.HasPrefix(pkg, "cmd/") && pkg != "bench":
				t.Errorf("%s may import %s: only cmd and bench may", pkg, imp)
			case !outside && !listed:
				t.Errorf("%s may import %s, which is not in the table", pkg, imp)
			}
		}
	}
	for _, pkg := range []string{"ublk", "nbd"} {
		if slices.ContainsFunc(all(pkg), func(i string) bool { return strings.HasPrefix(i, "rdma") }) {
			t.Errorf("front end %s sees RDMA", pkg)
		}
	}
	for _, host := range []string{"sq", "cq", "initiator"} {
		if slices.Contains(table["target"].may, host) {
			t.Errorf("target sees %s", host)
		}
	}
}
