package options

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/pflag"
)

// flagValue is a flag whose value is checked when it is set, so that the error names
// the flag and nothing else has happened yet.
type flagValue[T any] struct {
	dst    *T
	parse  func(string) (T, error)
	format func(T) string
	kind   string // name of a value in --help
	want   string // accepted values, for errors
}

// String implements pflag.Value.
func (v *flagValue[T]) String() string {
	if v.dst == nil {
		return ""
	}
	return v.format(*v.dst)
}

// Type implements pflag.Value.
func (v *flagValue[T]) Type() string { return v.kind }

// Set implements pflag.Value.
func (v *flagValue[T]) Set(s string) error {
	x, err := v.parse(s)
	if err != nil {
		return &rejected{want: v.want, why: err}
	}
	*v.dst = x
	return nil
}

// Want says what the flag accepts.
func (v *flagValue[T]) Want() string { return v.want }

// rejected is the error of a value that is not accepted.
type rejected struct {
	want string
	why  error
}

func (r *rejected) Error() string {
	if errors.Is(r.why, errUnwanted) {
		return "want " + r.want
	}
	return fmt.Sprintf("%v; want %s", r.why, r.want)
}

// errUnwanted is the cause if all that can be said of a value is which ones are
// accepted.
var errUnwanted = errors.New("not wanted")

// FlagError makes the one line about a flag that does not parse: the flag, its value,
// and the accepted values.
func FlagError(err error) error {
	var invalid *pflag.InvalidValueError
	var missing *pflag.ValueRequiredError
	switch {
	case errors.As(err, &invalid) && errors.Is(invalid.Unwrap(), errForeign):
		return fmt.Errorf("%s: %w", flagName(invalid.GetFlag()), errForeign)
	case errors.As(err, &invalid) && isSecret(invalid.GetFlag()):
		return fmt.Errorf("%s: %w", flagName(invalid.GetFlag()), cause(invalid))
	case errors.As(err, &invalid):
		return fmt.Errorf("%s %q: %w", flagName(invalid.GetFlag()), invalid.GetValue(), cause(invalid))
	case errors.As(err, &missing):
		return fmt.Errorf("%s: no value is given; want %s", flagName(missing.GetFlag()), wanted(missing.GetFlag()))
	}
	return err
}

func flagName(f *pflag.Flag) string {
	if f.Shorthand != "" {
		return "-" + f.Shorthand + "/--" + f.Name
	}
	return "--" + f.Name
}

func cause(e *pflag.InvalidValueError) error {
	if r := (*rejected)(nil); errors.As(e.Unwrap(), &r) {
		return r
	}
	return errors.New("want " + wanted(e.GetFlag()))
}

func wanted(f *pflag.Flag) string {
	if w, ok := f.Value.(interface{ Want() string }); ok {
		return w.Want()
	}
	switch f.Value.Type() {
	case "bool":
		return "true or false"
	case "int":
		return "a whole number"
	case "count":
		return "no value"
	case "uint8", "uint16", "uint32", "uint64":
		bits, _ := strconv.Atoi(strings.TrimPrefix(f.Value.Type(), "uint"))
		return fmt.Sprintf("a number, 0 to %d", uint64(1)<<bits-1)
	}
	if name, _ := pflag.UnquoteUsage(f); strings.Contains(f.Usage, "`"+name+"`") {
		return name
	}
	return "a " + f.Value.Type()
}

// number is a flag for a whole number from lo to hi.
func number[T int | int64 | uint8 | uint16 | uint32](dst *T, lo, hi int64, what string) *flagValue[T] {
	return &flagValue[T]{
		dst: dst,
		parse: func(s string) (T, error) {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil || n < lo || n > hi {
				return 0, errUnwanted
			}
			return T(n), nil
		},
		format: func(n T) string { return strconv.FormatInt(int64(n), 10) },
		kind:   "number",
		want:   fmt.Sprintf("%s, %d to %d", what, lo, hi),
	}
}

// seconds is a flag for a whole number of seconds from lo to hi, like the timeouts of
// nvme-cli.
func seconds(dst *time.Duration, lo, hi int64, want string) *flagValue[time.Duration] {
	return &flagValue[time.Duration]{
		dst: dst,
		parse: func(s string) (time.Duration, error) {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil || n < lo || n > hi {
				return 0, errUnwanted
			}
			return time.Duration(n) * time.Second, nil
		},
		format: func(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) },
		kind:   "seconds",
		want:   want,
	}
}

// Duration is a flag for a Go duration or a whole number of seconds.
func Duration(dst *time.Duration, lo, hi time.Duration) *flagValue[time.Duration] {
	return &flagValue[time.Duration]{
		dst: dst,
		parse: func(s string) (time.Duration, error) {
			d, err := time.ParseDuration(s)
			if n, nerr := strconv.ParseInt(s, 10, 32); nerr == nil {
				d, err = time.Duration(n)*time.Second, nil
			}
			if err != nil || d < lo || d > hi {
				return 0, errUnwanted
			}
			return d, nil
		},
		format: time.Duration.String,
		kind:   "duration",
		want:   fmt.Sprintf("seconds, or a time like 1m30s, %v to %v", lo, hi),
	}
}

// size is a flag for a number of bytes, a multiple of unit from lo to hi.
func size(dst *int, unit, lo, hi int) *flagValue[int] {
	want := fmt.Sprintf("a size like 64KiB, %s to %s", ibytes(lo), ibytes(hi))
	return &flagValue[int]{
		dst: dst,
		parse: func(s string) (int, error) {
			n, err := humanize.ParseBytes(s)
			switch {
			case err != nil || strings.Contains(s, ","):
				return 0, errUnwanted
			case n < uint64(lo) || n > uint64(hi):
				return 0, fmt.Errorf("that is %d %s", n, english.PluralWord(int(min(n, 2)), "byte", ""))
			case n%uint64(unit) != 0:
				return 0, fmt.Errorf("%d bytes is not a multiple of %d", n, unit)
			}
			return int(n), nil
		},
		format: ibytes,
		kind:   "size",
		want:   want,
	}
}

// ibytes formats a size so that the flag size parses it to the same value.
func ibytes(n int) string {
	switch {
	case n >= humanize.MiByte && n%humanize.MiByte == 0:
		return fmt.Sprintf("%dMiB", n/humanize.MiByte)
	case n >= humanize.KiByte && n%humanize.KiByte == 0:
		return fmt.Sprintf("%dKiB", n/humanize.KiByte)
	}
	return fmt.Sprintf("%dB", n)
}

// OneOf is a flag for one of the words.
func OneOf(dst *string, words ...string) *flagValue[string] {
	return &flagValue[string]{
		dst: dst,
		parse: func(s string) (string, error) {
			if !slices.Contains(words, s) {
				return "", errUnwanted
			}
			return s, nil
		},
		format: func(s string) string { return s },
		kind:   strings.Join(words, "|"),
		want:   orList(words),
	}
}

func orList(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// text is a flag for a string that check accepts.
func text(dst *string, kind, want string, check func(string) error) *flagValue[string] {
	return &flagValue[string]{
		dst: dst,
		parse: func(s string) (string, error) {
			return s, check(s)
		},
		format: func(s string) string { return s },
		kind:   kind,
		want:   want,
	}
}

// numbers is a flag that collects whole numbers from lo to hi. It may be repeated, and
// a value may be a list with commas.
type numbers struct {
	dst    *[]uint32
	lo, hi uint32
	what   string
}

func (v *numbers) String() string {
	if v.dst == nil {
		return ""
	}
	return strings.Join(v.GetSlice(), ",")
}

// GetSlice returns the numbers in decimal.
func (v *numbers) GetSlice() []string {
	var out []string
	for _, n := range *v.dst {
		out = append(out, strconv.FormatUint(uint64(n), 10))
	}
	return out
}

func (v *numbers) Type() string { return "numbers" }

func (v *numbers) Want() string {
	return fmt.Sprintf("%s, %d to %d, several by commas or by repeating the flag", v.what, v.lo, v.hi)
}

func (v *numbers) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		n, err := strconv.ParseUint(word, 10, 32)
		if err != nil || uint32(n) < v.lo || uint32(n) > v.hi {
			return &rejected{want: v.Want(), why: errUnwanted}
		}
		if !slices.Contains(*v.dst, uint32(n)) {
			*v.dst = append(*v.dst, uint32(n))
		}
	}
	return nil
}

// Interval is a flag for the time between two samples.
func Interval(dst *time.Duration) pflag.Value { return Duration(dst, 100*time.Millisecond, time.Hour) }

// Count is a flag for a number of samples; 0 is no limit.
func Count(dst *int) pflag.Value { return number(dst, 0, 1<<31-1, "a number") }
