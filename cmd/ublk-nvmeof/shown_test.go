package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
)

// TestShown: what a command shows of a status is in the part that its server reports.
func TestShown(t *testing.T) {
	var all control.Status
	n := 0
	fill(reflect.ValueOf(&all).Elem(), &n)
	all.Paths[0].CNTLID = 0 // it is not connected
	text, err := json.Marshal(shownOf(all))
	if err != nil {
		t.Fatal(err)
	}
	var part shown
	if err := json.Unmarshal(text, &part); err != nil {
		t.Fatal(err)
	}
	show := func(s control.Status, format string, verbose bool) string {
		t.Helper()
		var b bytes.Buffer
		results := []output.SubsystemResult{{NQN: s.NQN, Outcome: output.New, Status: s}, {NQN: s.NQN, Outcome: output.Already, Status: s}}
		for _, err := range []error{
			output.Connected(&b, s, format, verbose), output.PathsAdded(&b, s, []string{"path"}, format, verbose),
			output.ConnectedAll(&b, results, format, verbose),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		fmt.Fprintln(&b, output.Endpoint(s))
		return b.String()
	}
	for _, format := range []string{output.Normal, output.JSON} {
		for _, verbose := range []bool{false, true} {
			if got, want := show(part.status(), format, verbose), show(all, format, verbose); got != want {
				t.Errorf("%s, verbose %t:\n%s\nwant\n%s", format, verbose, got, want)
			}
		}
	}
}

// fill gives each field a value of its own, and slices two elements.
func fill(v reflect.Value, n *int) {
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.String:
		v.SetString(fmt.Sprint("text", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Float64:
		v.SetFloat(float64(*n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n) & 0xff)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	}
}
