package nbd

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// logLimit keeps clients from filling the log. It passes a burst of logBurst messages, and
// then one message per logPause, with the number of messages that it has dropped. Any
// goroutine.
type logLimit struct {
	mu      sync.Mutex
	left    int
	since   time.Time
	dropped int
}

const (
	logBurst = 100
	logPause = time.Second
)

func (l *logLimit) warn(log *slog.Logger, msg string, args ...any) {
	l.log(log, slog.LevelWarn, msg, args)
}
func (l *logLimit) info(log *slog.Logger, msg string, args ...any) {
	l.log(log, slog.LevelInfo, msg, args)
}

func (l *logLimit) log(log *slog.Logger, level slog.Level, msg string, args []any) {
	dropped, ok := l.allow(time.Now())
	if !ok {
		return
	}
	if dropped > 0 {
		args = append(args, "messages_dropped", dropped)
	}
	log.Log(context.Background(), level, msg, args...) //nolint:sloglint // its callers have the texts
}

// allow reports whether a message may be logged, and how many were dropped before it.
func (l *logLimit) allow(now time.Time) (dropped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := int(min(now.Sub(l.since)/logPause, logBurst)); n > 0 {
		l.left, l.since = min(l.left+n, logBurst), now
	}
	if l.left == 0 {
		l.dropped++
		return 0, false
	}
	l.left--
	dropped, l.dropped = l.dropped, 0
	return dropped, true
}
