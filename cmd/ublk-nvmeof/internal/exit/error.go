package exit

import (
	"errors"
	"fmt"
	"strings"
)

// Error is an error with an exit code. A server sends it as JSON to the command that
// waits for it.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"error"` // one line
}

func (e *Error) Error() string { return e.Message }

// Errorf formats an Error like fmt.Errorf, but it wraps nothing: only the text of its
// arguments remains.
func Errorf(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Message: oneLine(fmt.Sprintf(format, args...))}
}

// From makes an Error of any error, with the code that Of finds and the text of the
// whole chain. From(nil) is nil.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	return &Error{Code: Of(err), Message: oneLine(err.Error())}
}

// Of returns the exit code of an error: that of an Error in its chain, or the one that
// the other errors in it call for.
func Of(err error) Code {
	if err == nil {
		return OK
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return classify(err)
}

// oneLine makes one line of the lines of joined errors.
func oneLine(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ") }
