package configfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// A value of JSON is an object, an array, or a scalar. What a file has and this package
// does not know keeps its place and its text.
type (
	object struct{ members []member }
	array  struct{ values []any }
	scalar json.RawMessage
	member struct {
		key   string
		value any // *object, *array or scalar
	}
)

// get returns a member, or nil.
func (o *object) get(key string) any {
	for _, m := range o.members {
		if m.key == key {
			return m.value
		}
	}
	return nil
}

// set replaces a member, or adds it at the end.
func (o *object) set(key string, value any) {
	for i := range o.members {
		if o.members[i].key == key {
			o.members[i].value = value
			return
		}
	}
	o.members = append(o.members, member{key, value})
}

// text returns a member that is a string, or "".
func (o *object) text(key string) string {
	s, ok := o.get(key).(scalar)
	var text string
	if !ok || json.Unmarshal(s, &text) != nil {
		return ""
	}
	return text
}

// list returns a member that is an array. A member that is missing is added.
func (o *object) list(key string) (*array, error) {
	switch v := o.get(key).(type) {
	case nil:
		a := &array{}
		o.set(key, a)
		return a, nil
	case *array:
		return v, nil
	}
	return nil, fmt.Errorf("%s: want an array", key)
}

// objects returns the values, which must be objects.
func (a *array) objects(what string) (out []*object, err error) {
	for i, v := range a.values {
		o, ok := v.(*object)
		if !ok {
			return nil, fmt.Errorf("%s %d: want an object", what, i)
		}
		out = append(out, o)
	}
	return out, nil
}

// maxDepth is how deeply a file may be nested.
const maxDepth = 32

// parse decodes one value, and nothing after it.
func parse(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	v, err := decode(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("there is more after the end, at byte %d", d.InputOffset())
	}
	return v, nil
}

func decode(d *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested more than %d times", maxDepth)
	}
	t, err := token(d)
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('{'):
		o := &object{}
		for d.More() {
			key, err := token(d)
			if err != nil {
				return nil, err
			}
			value, err := decode(d, depth+1)
			if err != nil {
				return nil, err
			}
			o.set(key.(string), value)
		}
		_, err := token(d)
		return o, err
	case json.Delim('['):
		a := &array{}
		for d.More() {
			value, err := decode(d, depth+1)
			if err != nil {
				return nil, err
			}
			a.values = append(a.values, value)
		}
		_, err := token(d)
		return a, err
	}
	return scalarOf(t)
}

// token returns the next token, which must be there.
func token(d *json.Decoder) (json.Token, error) {
	t, err := d.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return t, err
}

// scalarOf encodes a string, a number, a bool or nil.
func scalarOf(v any) (scalar, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return scalar(bytes.TrimSpace(b.Bytes())), err
}

// write encodes a value as nvme-cli does: indented by two spaces, and no space after a
// colon.
func write(b *strings.Builder, v any, indent string) {
	inner := indent + "  "
	separator := "\n"
	switch v := v.(type) {
	case *object:
		b.WriteByte('{')
		for _, m := range v.members {
			key, _ := scalarOf(m.key) // a string can be encoded
			fmt.Fprintf(b, "%s%s%s:", separator, inner, key)
			write(b, m.value, inner)
			separator = ",\n"
		}
		if len(v.members) > 0 {
			b.WriteString("\n" + indent)
		}
		b.WriteByte('}')
	case *array:
		b.WriteByte('[')
		for _, value := range v.values {
			b.WriteString(separator + inner)
			write(b, value, inner)
			separator = ",\n"
		}
		if len(v.values) > 0 {
			b.WriteString("\n" + indent)
		}
		b.WriteByte(']')
	case scalar:
		b.Write(v)
	}
}
