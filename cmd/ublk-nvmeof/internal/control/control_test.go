package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// fake is a server that does as it is told.
type fake struct {
	status   Status
	err      error
	asked    []bool // force of each Disconnect
	queries  []Query
	reserved []Reservation
	paths    []string // requests about them
	reauth   Reauthentication
	wait     chan struct{}
	done     chan struct{} // closed when Disconnect returns
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

func (f *fake) HandOver(context.Context, string) error { return f.err }

func (f *fake) Query(ctx context.Context, q Query) (QueryResult, error) {
	f.queries = append(f.queries, q)
	return QueryResult{Result: 7, Data: make([]byte, max(0, min(q.Length, 4096)))}, errors.Join(f.err, f.Reset(ctx))
}

// Reset takes until wait is closed, or its context ends.
func (f *fake) Reset(ctx context.Context) error {
	if f.wait == nil {
		return f.err
	}
	defer close(f.done)
	select {
	case <-f.wait:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fake) Reserve(_ context.Context, r Reservation) ([]byte, error) {
	f.reserved = append(f.reserved, r)
	return bytes.Repeat([]byte{7}, len(r.Data)), f.err
}

func (f *fake) Rescan(context.Context) error { return f.err }
func (f *fake) Reauthenticate(_ context.Context, r Reauthentication) error {
	f.reauth = r
	return f.err
}

func (f *fake) AddPath(_ context.Context, r PathRequest) error {
	f.paths = append(f.paths, "add "+r.Path)
	return f.err
}

func (f *fake) RemovePath(_ context.Context, r PathRequest) error {
	f.paths = append(f.paths, "remove "+r.Path)
	return f.err
}

func (f *fake) SetPolicy(_ context.Context, r PolicyRequest) error {
	f.paths = append(f.paths, "policy "+r.Policy+" "+r.Preferred)
	return f.err
}

// TestPaths checks that requests about paths arrive, and that errors come back.
func TestPaths(t *testing.T) {
	f := &fake{}
	c := serve(t, f)
	ask := func() error {
		return errors.Join(c.AddPath(t.Context(), PathRequest{Path: "192.0.2.1,4421"}), c.RemovePath(t.Context(), "192.0.2.1"),
			c.SetPolicy(t.Context(), PolicyRequest{"preferred", "192.0.2.1"}))
	}
	if err := ask(); err != nil {
		t.Error(err)
	}
	if want := []string{"add 192.0.2.1,4421", "remove 192.0.2.1", "policy preferred 192.0.2.1"}; !slices.Equal(f.paths, want) {
		t.Errorf("%q, want %q", f.paths, want)
	}
	f.err = exit.Errorf(exit.Busy, "no")
	if err := ask(); exit.Of(err) != exit.Busy {
		t.Error(err)
	}
}

func TestQuery(t *testing.T) {
	f := &fake{}
	c := serve(t, f)
	want := Query{Command: bytes.Repeat([]byte{1, 2}, 32), Length: 512}
	if got, err := c.Query(t.Context(), want); err != nil || got.Result != 7 || len(got.Data) != 512 || !reflect.DeepEqual(f.queries, []Query{want}) {
		t.Errorf("%+v, %v; asked %+v", got, err, f.queries)
	}
	if _, err := c.Query(t.Context(), Query{Length: 5000}); err == nil || !strings.Contains(err.Error(), "4096 bytes of 5000") {
		t.Errorf("a short answer: %v", err)
	}
	reserve := Reservation{NSID: 3, Command: want.Command, Data: make([]byte, 4096)}
	if got, err := c.Reserve(t.Context(), reserve); err != nil || len(got) != 4096 || got[9] != 7 || !reflect.DeepEqual(f.reserved, []Reservation{reserve}) {
		t.Errorf("reservation: %d bytes, %v; asked %+v", len(got), err, f.reserved)
	}
	for name, do := range map[string]func() error{
		"query":       func() error { _, err := c.Query(t.Context(), want); return err },
		"reservation": func() error { _, err := c.Reserve(t.Context(), Reservation{NSID: 3}); return err },
		"reset":       func() error { return c.Reset(t.Context()) },
		"rescan":      func() error { return c.Rescan(t.Context()) },
		"reauth": func() error {
			keys := Reauthentication{Host: "a", Controller: "b"}
			err := c.Reauthenticate(t.Context(), keys)
			if f.reauth != keys {
				t.Errorf("the server got %+v", f.reauth)
			}
			return err
		},
	} {
		f.err = nil
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, want := range []exit.Code{exit.Usage, exit.Busy, exit.Negotiation} {
			f.err = exit.Errorf(want, "told to")
			if err := do(); exit.Of(err) != want || !strings.Contains(err.Error(), "told to") {
				t.Errorf("%s: %v, code %d, want %d", name, err, exit.Of(err), want)
			}
		}
	}
}

// What takes longer than the time for reading a request goes on, but not longer than its
// client waits.
func TestPatience(t *testing.T) {
	read := readTimeout
	readTimeout = 50 * time.Millisecond
	t.Cleanup(func() { readTimeout = read }) // after the server's end
	f := &fake{wait: make(chan struct{}), done: make(chan struct{})}
	time.AfterFunc(4*readTimeout, func() { close(f.wait) })
	if err := serve(t, f).Reset(t.Context()); err != nil {
		t.Errorf("a reset that takes long: %v", err)
	}
	f = &fake{wait: make(chan struct{}), done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 4*readTimeout)
	defer cancel()
	if err := serve(t, f).Reset(ctx); exit.Of(err) != exit.Timeout {
		t.Errorf("a client that gives up: %v", err)
	}
	<-f.done // not before the end of the test otherwise
}

func TestHandOver(t *testing.T) {
	f := &fake{}
	c := serve(t, f)
	if err := c.HandOver(t.Context(), ""); err != nil {
		t.Error(err)
	}
	f.err = exit.Errorf(exit.Other, "no device")
	var e *exit.Error
	if err := c.HandOver(t.Context(), ""); !errors.As(err, &e) || e.Message != "no device" {
		t.Errorf("refused: %v", err)
	}
}

// serve puts f behind a socket.
func serve(t *testing.T, f *fake) *Client {
	t.Helper()
	c, _ := serveAt(t, f)
	return c
}

func serveAt(t *testing.T, f *fake) (c *Client, socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "control") // t.TempDir may be longer than a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "control.sock")
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
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-joined; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	})
	return NewClient(socket), socket
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

// A server of another build may not know a request.
func TestUnknownRequest(t *testing.T) {
	err := serve(t, &fake{}).Do(t.Context(), http.MethodPost, "/v1/later", nil, nil)
	if err == nil || err.Error() != "ask server: it runs another build of this program, which does not know /v1/later" {
		t.Error(err)
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
		{"POST", "/v1/query", `{"command": 1}`, 400},
		{"POST", "/v1/query", `{"command": "` + strings.Repeat("A", maxBody) + `"}`, 400},
		{"GET", "/v1/query", "", 405},
		{"POST", "/v1/reservation", `{"nsid": -1}`, 400},
		{"POST", "/v1/reservation", `{"data": "` + strings.Repeat("A", maxReservation) + `"}`, 400},
		{"GET", "/v1/reset", "", 405},
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

// Clients that ask for nothing, or read nothing, keep neither the server nor others
// for long, and only so many are there at a time.
func TestFlood(t *testing.T) {
	read, answer := readTimeout, answerTimeout
	readTimeout, answerTimeout = 500*time.Millisecond, 3*time.Second
	t.Cleanup(func() { readTimeout, answerTimeout = read, answer }) // after the server's end
	const long = 512 << 10                                          // above what a socket's buffer takes
	f := &fake{status: Status{SchemaVersion: SchemaVersion, Name: strings.Repeat("x", long)}}
	c, socket := serveAt(t, f)
	var conns []net.Conn
	for i := range 2 * maxClients {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		if i%2 == 0 { // an answer that it does not read
			if _, err := io.WriteString(conn, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	if s, err := c.Status(ctx); err != nil || len(s.Name) != long {
		t.Fatalf("after %v: %v", time.Since(began), err)
	}
	// All have been given up, but for those that wait to be accepted behind the client.
	for _, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a client is kept: %v", err)
		}
	}
}

// What is longer than any answer is not read to its end.
func TestEndlessAnswer(t *testing.T) {
	f := &fake{status: Status{SchemaVersion: SchemaVersion, Name: strings.Repeat("x", maxAnswer)}}
	if _, err := serve(t, f).Status(t.Context()); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Error(err)
	}
}

// FuzzRequests sends any bytes as a request. Whatever they are, nothing happens but
// what a request that makes sense asks for.
func FuzzRequests(f *testing.F) {
	for _, text := range []string{
		"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /v1/disconnect HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{\"force\": true}",
		"POST /v1/disconnect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"POST /v1/handover HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /v1/query HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\n{\"command\": \"AAAA\", \"length\": 4}",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			return
		}
		c := &fake{}
		w := httptest.NewRecorder()
		NewServer(c, slog.New(slog.DiscardHandler)).Handler.ServeHTTP(w, req)
		if w.Code < 200 || w.Code > 499 {
			t.Errorf("answer %d", w.Code)
		}
		if len(c.asked) > 0 && (req.Method != http.MethodPost || req.URL.Path != "/v1/disconnect" || w.Code != http.StatusOK) {
			t.Errorf("%s %s: disconnected, answer %d", req.Method, req.URL, w.Code)
		}
	})
}
