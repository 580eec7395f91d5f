package output

import (
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text makes a line for a terminal of any text, which may be a peer's: what cannot
// be printed, like a newline or the beginning of a terminal's control sequence,
// is written as in a Go string literal (\n, \x1b, \u202e).
func Text(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		if unicode.IsPrint(r) && (r != utf8.RuneError || size > 1) {
			b.WriteString(s[:size])
		} else {
			quoted := strconv.Quote(s[:size])
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		s = s[size:]
	}
	return b.String()
}

// printable is a copy of v whose strings went through Text, so that no field can
// be forgotten where a table is written. v is made of the types that JSON has.
func printable[T any](v T) T {
	out := reflect.New(reflect.TypeFor[T]()).Elem()
	makePrintable(out, reflect.ValueOf(&v).Elem())
	return out.Interface().(T)
}

func makePrintable(to, from reflect.Value) {
	switch from.Kind() {
	case reflect.String:
		to.SetString(Text(from.String()))
	case reflect.Struct:
		for i := range from.NumField() {
			makePrintable(to.Field(i), from.Field(i))
		}
	case reflect.Slice:
		if from.IsNil() {
			return
		}
		to.Set(reflect.MakeSlice(from.Type(), from.Len(), from.Len()))
		for i := range from.Len() {
			makePrintable(to.Index(i), from.Index(i))
		}
	case reflect.Map:
		if from.IsNil() {
			return
		}
		to.Set(reflect.MakeMapWithSize(from.Type(), from.Len()))
		for it := from.MapRange(); it.Next(); {
			key, value := reflect.New(from.Type().Key()).Elem(), reflect.New(from.Type().Elem()).Elem()
			makePrintable(key, it.Key())
			makePrintable(value, it.Value())
			to.SetMapIndex(key, value)
		}
	case reflect.Pointer:
		if from.IsNil() {
			return
		}
		to.Set(reflect.New(from.Type().Elem()))
		makePrintable(to.Elem(), from.Elem())
	default:
		to.Set(from)
	}
}
