package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// fields WANT GOT [NAME …]: each field of the first JSON file is in the second one, with
// the same value; the second one may have more. A number and its text are the same. Fields of a NAME may have other values.
// "*" is every name that is not of an object or an array.
func fields(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: fields want.json got.json [name ...]")
	}
	c := comparison{other: args[2:]}
	c.compare("", decode(ts, args[0]), decode(ts, args[1]))
	if len(c.wrong) > 0 {
		ts.Fatalf("%s and %s:\n%s", args[0], args[1], strings.Join(c.wrong, "\n"))
	}
	if c.same == 0 && len(c.other) == 0 {
		ts.Fatalf("%s has no field", args[0])
	}
}

// decode reads a JSON file.
func decode(ts *testscript.TestScript, file string) (v any) {
	d := json.NewDecoder(strings.NewReader(ts.ReadFile(file)))
	d.UseNumber()
	ts.Check(d.Decode(&v))
	return v
}

type comparison struct {
	other []string // names of fields whose values may differ
	same  int
	wrong []string
}

func (c *comparison) compare(at string, want, got any) {
	name := at[strings.LastIndexByte(at, '.')+1:]
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			c.wrong = append(c.wrong, fmt.Sprintf("%s: %T, not an object", at, got))
			return
		}
		for _, k := range slices.Sorted(maps.Keys(w)) {
			if _, ok := g[k]; !ok {
				c.wrong = append(c.wrong, fmt.Sprintf("%s.%s is missing", at, k))
				continue
			}
			c.compare(at+"."+k, w[k], g[k])
		}
		return
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) < len(w) {
			c.wrong = append(c.wrong, fmt.Sprintf("%s: %v, not %d elements", at, got, len(w)))
			return
		}
		for i := range w {
			c.compare(at, w[i], g[i])
		}
		return
	}
	// Versions of nvme-cli write numbers of 128 bits as numbers or as strings.
	if n, ok := got.(json.Number); ok && want == n.String() {
		want = got
	}
	switch {
	case reflect.DeepEqual(want, got):
		c.same++
	case !slices.Contains(c.other, name) && !slices.Contains(c.other, "*"):
		c.wrong = append(c.wrong, fmt.Sprintf("%s: %v, want %v", at, got, want))
	}
}
