package control

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// fake is a server that does as it is told.
type fake struct {
	status Status
	err    error
	asked  []bool // force of each Disconnect
	wait   chan struct{}
	done   chan struct{} // closed when Disconnect returns
}

func (f *fake) Status() Status { return f.status }

func (f *fake) Disconnect(ctx context.Context, force bool) error {
	f.asked = append(f.asked, force)
	if f.wait != nil {
		defer close(f.done)
		select {
		case <-f.wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return f.err
}

func (f *fake) HandOver(context.Context) error { return f.err }

func TestHandOver(t *testing.T) {
	f := &fake{}
	c := serve(t, f)
	if err := c.HandOver(t.Context()); err != nil {
		t.Error(err)
	}
	f.err = exit.Errorf(exit.Other, "no device")
	var e *exit.Error
	if err := c.HandOver(t.Context()); !errors.As(err, &e) || e.Message != "no device" {
		t.Errorf("refused: %v", err)
	}
}

// serve puts f behind a socket.
func serve(t *testing.T, f *fake) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "control") // t.TempDir may be longer than a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "control.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	s := NewServer(f, slog.New(slog.DiscardHandler))
	joined := make(chan error, 1)
	go func() { joined <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-joined; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	})
	return NewClient(socket)
}

func TestStatus(t *testing.T) {
	want := Status{
		SchemaVersion: SchemaVersion, Name: "ctrl0", PID: 7, State: "live", NQN: "nqn.x",
		Queues:  Queues{Requested: 4, Granted: 3, Poll: Class{Requested: 1, Mapped: "default"}},
		Devices: []Device{{Device: "ublkb0", NSID: 1, Size: 1 << 40, Counters: IO{Reads: 1}}},
		Lanes:   []Lane{{Submitted: 1<<64 - 1}},
	}
	got, err := serve(t, &fake{status: want}).Status(t.Context())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	if _, err := serve(t, &fake{status: Status{SchemaVersion: 99}}).Status(t.Context()); err == nil {
		t.Error("another schema was accepted")
	}
}

func TestDisconnect(t *testing.T) {
	for _, force := range []bool{false, true} {
		f := &fake{}
		if err := serve(t, f).Disconnect(t.Context(), force); err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(f.asked, []bool{force}) {
			t.Errorf("asked %v, want force %v", f.asked, force)
		}
	}
	for _, want := range []exit.Code{exit.Busy, exit.Timeout, exit.Other} {
		f := &fake{err: exit.Errorf(want, "device %s", "x")}
		err := serve(t, f).Disconnect(t.Context(), false)
		if exit.Of(err) != want || err.Error() != "device x" {
			t.Errorf("%v, code %d, want %d", err, exit.Of(err), want)
		}
	}
}

// A client that gives up does not stop what it asked for.
func TestDisconnectOutlivesItsClient(t *testing.T) {
	f := &fake{wait: make(chan struct{}), done: make(chan struct{})}
	c := serve(t, f)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Disconnect(ctx, false); exit.Of(err) != exit.Timeout {
		t.Fatalf("%v, want a timeout", err)
	}
	select {
	case <-f.done:
		t.Error("the server gave up, too")
	default:
	}
	close(f.wait)
	<-f.done
}

func TestNobodyThere(t *testing.T) {
	dir := t.TempDir()
	if _, err := NewClient(filepath.Join(dir, "x")).Status(t.Context()); !Gone(err) {
		t.Errorf("no socket: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	c := serve(t, &fake{})
	for _, tt := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/v1/disconnect", "", 400},
		{"POST", "/v1/disconnect", "{", 400},
		{"POST", "/v1/disconnect", `{"force": "x"}`, 400},
		{"POST", "/v1/disconnect", `{"force": true` + strings.Repeat(" ", maxBody) + "}", 400},
		{"GET", "/v1/disconnect", "", 405},
		{"POST", "/v1/status", "", 405},
		{"GET", "/", "", 404},
	} {
		req, err := http.NewRequest(tt.method, "http://server"+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s %s %.20q: %s, want %d", tt.method, tt.path, tt.body, resp.Status, tt.want)
		}
	}
}
