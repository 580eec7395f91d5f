package output

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// schemaDir has a JSON schema of each output that programs read.
const schemaDir = "../../../../docs/schema"

// schema is the part of JSON Schema that the files use.
type schema struct {
	Title      string            `json:"title"`
	Draft      string            `json:"$schema"`
	Type       types             `json:"type"`
	Properties map[string]schema `json:"properties"`
	Additional *schema           `json:"additionalProperties"` // of maps
	Required   []string          `json:"required"`
	Items      *schema           `json:"items"`
}

// types is one type, or a list of them.
type types []string

func (t *types) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*t = types{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(t))
}

// check returns what a document has that its schema does not say. A property that the
// schema does not have is an error here, because it would not be documented.
func (s *schema) check(at string, v any) error {
	is := typeOf(v)
	if !slices.Contains(s.Type, is) && !(is == "integer" && slices.Contains(s.Type, "number")) {
		return fmt.Errorf("%s: it is %s, not %v", at, is, s.Type)
	}
	var errs []error
	switch v := v.(type) {
	case map[string]any:
		for _, name := range s.Required {
			if _, ok := v[name]; !ok {
				errs = append(errs, fmt.Errorf("%s: %s is missing", at, name))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(v)) {
			p, ok := s.Properties[name]
			if !ok && s.Additional != nil {
				p, ok = *s.Additional, true
			}
			if !ok {
				errs = append(errs, fmt.Errorf("%s: %s is not in the schema", at, name))
				continue
			}
			errs = append(errs, p.check(at+"."+name, v[name]))
		}
	case []any:
		for i, e := range v {
			if s.Items == nil {
				return fmt.Errorf("%s: items are not in the schema", at)
			}
			errs = append(errs, s.Items.check(fmt.Sprintf("%s[%d]", at, i), e))
		}
	}
	return errors.Join(errs...)
}

func typeOf(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return "boolean"
	case string:
		return "string"
	case json.Number:
		if _, ok := new(big.Int).SetString(v.String(), 10); ok {
			return "integer"
		}
		return "number"
	case []any:
		return "array"
	}
	return "object"
}

func parse(t *testing.T, text []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestSchemas holds the golden files against the schemas, and the schemas against files
// that lack something.
func TestSchemas(t *testing.T) {
	others := map[string]string{ // golden files of the same output, or of another name
		"resv-report-eds": "resv-extended", "list": "list list-empty", "list-subsys": "list-subsys list-subsys-empty",
		"connect-all": "connect-all connect-all-empty", "discover": "discover discover-tcp",
	}
	files, err := filepath.Glob(filepath.Join(schemaDir, "*.json"))
	if err != nil || len(files) < 20 {
		t.Fatalf("%d schemas, %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var s schema
		d := json.NewDecoder(bytes.NewReader(text))
		d.DisallowUnknownFields() // which this test would not check
		if err := d.Decode(&s); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		goldens := others[name]
		if goldens == "" {
			goldens = name
		}
		for _, g := range strings.Fields(goldens) {
			text, err := os.ReadFile(filepath.Join("testdata", g+".json"))
			if err != nil {
				t.Fatal(err)
			}
			doc := parse(t, text)
			if err := s.check(g, doc); err != nil {
				t.Error(err)
			}
			root, ok := doc.(map[string]any)
			if !ok {
				continue
			}
			for _, lost := range s.Required {
				less := maps.Clone(root)
				delete(less, lost)
				if s.check(g, less) == nil {
					t.Errorf("%s: nobody misses %s", g, lost)
				}
			}
			if more := maps.Clone(root); len(more) > 0 {
				more["extra"] = true
				if s.check(g, more) == nil {
					t.Errorf("%s: anything may be added", g)
				}
			}
		}
	}
}
