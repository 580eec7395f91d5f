package options

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// field is one KEY or KEY=VALUE of a text like "ram=1GiB,read-only".
type field struct {
	key, value string
	valued     bool // there is a "="
}

// fields takes a text apart at its commas. Two commas in a row are one comma of a
// value.
func fields(text string) []field {
	const comma = "\x00"
	var out []field
	for word := range strings.SplitSeq(strings.ReplaceAll(text, ",,", comma), ",") {
		key, value, valued := strings.Cut(strings.ReplaceAll(word, comma, ","), "=")
		out = append(out, field{key, value, valued})
	}
	return out
}

// wrong is the error of a field.
func (f field) wrong(want string) error { return fmt.Errorf("%s=%q: want %s", f.key, f.value, want) }

// number is a value lo..hi, decimal, or hexadecimal with 0x.
func (f field) number(lo, hi uint64) (uint64, error) {
	n, err := strconv.ParseUint(f.value, 0, 64)
	if err != nil || n < lo || n > hi {
		return 0, f.wrong(fmt.Sprintf("a number, %d to %d", lo, hi))
	}
	return n, nil
}

// bare is the error of a value where there is to be none.
func (f field) bare() error {
	if f.valued {
		return fmt.Errorf("%s=%q: want %s alone", f.key, f.value, f.key)
	}
	return nil
}

// words parse fields, by key.
type words[T any] map[string]func(*T, field) error

func (w words[T]) parse(into *T, f field) error {
	parse := w[f.key]
	if parse == nil {
		return fmt.Errorf("unknown word %q", f.key)
	}
	return parse(into, f)
}

// names lists the keys of m, for an error that says what is known.
func names[V any](m map[string]V) string {
	var all []string
	for name := range m {
		all = append(all, name)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}
