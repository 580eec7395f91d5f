package exit

import (
	"errors"
	"fmt"
	"strings"
)

// Error is an error whose exit code is known. It travels as JSON from a server
// to the command that waits for it.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"error"` // one line
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error. Like fmt.Errorf, but what it wraps is only text.
func Errorf(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Message: oneLine(fmt.Sprintf(format, args...))}
}

// From makes an Error of any error: the Error in its chain, with the text of
// the whole chain, or one with the code that Of finds. From(nil) is nil.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	return &Error{Code: Of(err), Message: oneLine(err.Error())}
}

// Of is the exit code of an error.
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

// oneLine joins the lines of joined errors.
func oneLine(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ") }
