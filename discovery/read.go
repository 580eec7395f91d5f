package discovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// Limits bound what a service can make a host do. The zero value has the defaults.
type Limits struct {
	Entries  int           // of one log; 0: 4096
	Attempts int           // to read a log that changes meanwhile; 0: 10
	Depth    int           // of referrals of referrals; 0: 8
	Services int           // in one walk; 0: 64
	Time     time.Duration // to connect to a service and read its log; 0: 30 s
}

func (l Limits) withDefaults() Limits {
	for _, f := range []struct {
		field *int
		value int
	}{{&l.Entries, 4096}, {&l.Attempts, 10}, {&l.Depth, 8}, {&l.Services, 64}} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	if l.Time == 0 {
		l.Time = 30 * time.Second
	}
	return l
}

// Reader reads log pages of a discovery controller, as initiator.Subsystem does.
type Reader interface {
	ReadLog(ctx context.Context, r initiator.LogRequest, out []byte) error
}

// Log is a discovery log.
type Log struct {
	Generation uint64 // counts the changes of the log
	Extended   bool   // entries have attributes
	Entries    []Entry
}

// Errors of Read that callers may want to tell apart.
var (
	// ErrChanging is a log that changed during every attempt to read it.
	ErrChanging = errors.New("the discovery log keeps changing")
	// ErrTooLarge is a log with more entries, or bytes, than the limits allow.
	ErrTooLarge = errors.New("the discovery log is too large")
)

// Pauses between two attempts to read a log that changes.
const (
	pauseMin = time.Millisecond
	pauseMax = 100 * time.Millisecond
)

// Read reads the whole log. If the log changes meanwhile, which its generation counter
// tells, Read starts again, at most limits.Attempts times. The event of the controller is
// enabled again by the last command, so that every later change is reported. Errors:
// ErrTooLarge, ErrChanging, those of r, a context error, and logs that make no sense.
func Read(ctx context.Context, r Reader, limits Limits) (*Log, error) {
	return read(ctx, r, limits, false)
}

// ReadExtended is Read with the attributes of the entries, if the controller has them.
func ReadExtended(ctx context.Context, r Reader, limits Limits) (*Log, error) {
	support, err := supported(ctx, r)
	if err != nil {
		return nil, err
	}
	return read(ctx, r, limits, support&nvme.DiscoveryExtended != 0)
}

// supported returns which kinds of log may be asked for. Controllers without the page that
// tells have none.
func supported(ctx context.Context, r Reader) (uint16, error) {
	var b [4]byte
	err := r.ReadLog(ctx, initiator.LogRequest{Page: nvme.LogSupported, Offset: 4 * nvme.LogDiscovery}, b[:])
	switch s := nvme.Status(0); {
	case errors.As(err, &s):
		return 0, nil
	case err != nil:
		return 0, err
	}
	support := nvme.LogSupport(uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24)
	if !support.Supported() {
		return 0, nil
	}
	return support.Specific(), nil
}

func read(ctx context.Context, r Reader, limits Limits, extended bool) (*Log, error) {
	limits = limits.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, limits.Time)
	defer cancel()
	page := logReader{Reader: r, limits: limits}
	if extended {
		page.request.Specific = nvme.DiscoveryExtended
	}
	pause := pauseMin
	for attempt := range limits.Attempts {
		if attempt > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			pause = min(2*pause, pauseMax)
		}
		log, settled, err := page.read(ctx)
		if err != nil || settled {
			return log, err
		}
	}
	return nil, fmt.Errorf("%w: it changed during each of %d attempts to read it", ErrChanging, limits.Attempts)
}

// logReader reads the discovery log of one controller.
type logReader struct {
	Reader
	limits  Limits
	request initiator.LogRequest
}

// read makes one attempt. It returns false if the log changed meanwhile.
func (l *logReader) read(ctx context.Context) (*Log, bool, error) {
	before, err := l.header(ctx, true)
	if err != nil {
		return nil, false, err
	}
	size, err := l.size(before)
	if err != nil {
		return nil, false, err
	}
	body := make([]byte, size)
	if size > 0 {
		if err := l.part(ctx, nvme.DiscoveryHeaderSize, body, true); err != nil {
			return nil, false, l.orChanged(ctx, before, err)
		}
	}
	after, err := l.header(ctx, false)
	if err != nil || after != before {
		return nil, false, err
	}
	log, err := parse(before, body)
	return log, true, err
}

// orChanged returns nil if the log changed, because a part of a log that has become
// shorter cannot be read any more, or else the error.
func (l *logReader) orChanged(ctx context.Context, before nvme.DiscoveryHeader, err error) error {
	if !errors.As(err, new(nvme.Status)) {
		return err
	}
	if now, herr := l.header(ctx, true); herr != nil || now == before {
		return err
	}
	return nil
}

// header reads the header of the log.
func (l *logReader) header(ctx context.Context, retain bool) (nvme.DiscoveryHeader, error) {
	var b [nvme.DiscoveryHeaderSize]byte
	if err := l.part(ctx, 0, b[:], retain); err != nil {
		return nvme.DiscoveryHeader{}, err
	}
	return nvme.ParseDiscoveryHeader(b[:])
}

func (l *logReader) part(ctx context.Context, offset uint64, out []byte, retain bool) error {
	r := l.request
	r.Page, r.Offset, r.Retain = nvme.LogDiscovery, offset, retain
	return l.ReadLog(ctx, r, out)
}

// size returns the length in bytes of all entries.
func (l *logReader) size(h nvme.DiscoveryHeader) (int, error) {
	if h.NumRec > uint64(l.limits.Entries) {
		return 0, fmt.Errorf("%w: it has %d entries, at most %d are read", ErrTooLarge, h.NumRec, l.limits.Entries)
	}
	n := int(h.NumRec)
	if n == 0 || h.Returned&nvme.DiscoveryExtended == 0 {
		return n * nvme.DiscoveryEntrySize, nil
	}
	limit := 2 * l.limits.Entries * nvme.DiscoveryEntrySize
	total := int64(h.Length) - nvme.DiscoveryHeaderSize
	switch {
	case total < int64(n)*nvme.ExtendedEntryMin || total%4 != 0:
		return 0, fmt.Errorf("extended discovery log: %d bytes cannot hold %d entries", h.Length, n)
	case total > int64(limit):
		return 0, fmt.Errorf("%w: it has %d bytes, at most %d are read", ErrTooLarge, h.Length, limit)
	}
	return int(total), nil
}

// parse decodes the entries of a log, which are exactly as long as they should be.
func parse(h nvme.DiscoveryHeader, body []byte) (*Log, error) {
	log := &Log{Generation: h.GenCtr, Extended: h.Returned&nvme.DiscoveryExtended != 0, Entries: make([]Entry, h.NumRec)}
	for i := range log.Entries {
		e := &log.Entries[i]
		size := nvme.DiscoveryEntrySize
		if log.Extended {
			var err error
			if e.DiscoveryEntry, e.Attributes, size, err = nvme.ParseExtendedEntry(body); err != nil {
				return nil, fmt.Errorf("entry %d of %d: %w", i, len(log.Entries), err)
			}
		} else {
			e.DiscoveryEntry = *nvme.DiscoveryEntryAt(body)
		}
		body = body[size:]
	}
	return log, nil
}
