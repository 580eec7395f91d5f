package loglimit

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		first := New(slog.New(slog.NewTextHandler(&out, nil)))
		l := first.With("x", 1).WithGroup("g")
		for range Burst + 7 {
			l.Info("again")
		}
		first.Debug("not enabled")
		if n := strings.Count(out.String(), "msg=again x=1\n"); n != Burst {
			t.Errorf("%d records", n)
		}
		time.Sleep(Interval)
		l.Info("later", "y", 2)
		first.Info("too early")
		time.Sleep(Interval)
		first.Info("last")
		text := out.String()
		for _, want := range []string{"msg=later x=1 g.y=2 g.omitted_before=7\n", "msg=last omitted_before=1\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in %s", want, text[strings.Index(text, "later"):])
			}
		}
		time.Sleep(time.Hour)
		out.Reset()
		for range 2 * Burst {
			l.Info("again")
		}
		if n := strings.Count(out.String(), "msg=again"); n != Burst {
			t.Errorf("%d records after an hour", n)
		}
	})
}
