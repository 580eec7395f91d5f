package systemd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/journal"
)

// ToJournal reports whether standard error is a stream to the journal.
func ToJournal() bool {
	ok, err := journal.StderrIsJournalStream()
	return err == nil && ok && journal.Enabled()
}

// journalHandler writes each record as an entry of the journal, with its level as the
// priority. The attributes are part of the message, and fields of the entry as well:
// NVMEOF_NSID=1.
type journalHandler struct {
	text   slog.Handler // writes attributes to buf
	buf    *bytes.Buffer
	mu     *sync.Mutex // guards buf
	fields map[string]string
	group  string
	send   func(message string, priority journal.Priority, fields map[string]string) error
	backup io.Writer // for what the journal does not take
}

// NewJournalHandler returns a handler that writes to the journal. What the journal does
// not take is written to backup, with the priority in front (sd-daemon(3)). Any goroutine
// may use it.
func NewJournalHandler(backup io.Writer, level slog.Level, identifier string) slog.Handler {
	buf := new(bytes.Buffer)
	return &journalHandler{
		text: slog.NewTextHandler(buf, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{} // the journal has them
			}
			return a
		}}),
		buf: buf, mu: new(sync.Mutex), fields: map[string]string{"SYSLOG_IDENTIFIER": identifier},
		send: journal.Send, backup: backup,
	}
}

// Enabled implements slog.Handler.
func (h *journalHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.text.Enabled(ctx, l)
}

// Handle implements slog.Handler.
func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.buf.Reset()
	if err := h.text.Handle(ctx, r); err != nil {
		return err
	}
	message := strings.TrimSpace(r.Message + " " + h.buf.String())
	fields := make(map[string]string, len(h.fields)+r.NumAttrs())
	for k, v := range h.fields {
		fields[k] = v
	}
	r.Attrs(func(a slog.Attr) bool {
		fields[field(h.group+a.Key)] = a.Value.String()
		return true
	})
	p := priority(r.Level)
	if err := h.send(message, p, fields); err != nil {
		_, err := fmt.Fprintf(h.backup, "<%d>%s\n", p, message)
		return err
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	other := *h
	other.text, other.fields = h.text.WithAttrs(attrs), map[string]string{}
	for k, v := range h.fields {
		other.fields[k] = v
	}
	for _, a := range attrs {
		other.fields[field(h.group+a.Key)] = a.Value.String()
	}
	return &other
}

// WithGroup implements slog.Handler.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	other := *h
	other.text, other.group = h.text.WithGroup(name), h.group+name+"_"
	return &other
}

// priority returns the priority of a level, as in syslog(3).
func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// field returns the name of an attribute as the name of a field, which may have capital
// letters, digits and underscores.
func field(key string) string {
	return "NVMEOF_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
}
