package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/internal/rundir"
)

// Controlled is what a socket controls.
type Controlled interface {
	Status() Status
	// Disconnect ends everything, and returns when it has ended. Without
	// force, a device in use makes it fail, with exit.Busy, and nothing has
	// changed.
	Disconnect(ctx context.Context, force bool) error
	// HandOver ends the service, but not the devices, which wait for another
	// server. If sessions is not empty, it is the path of a socket for the sessions of
	// front ends (vhost.Receive). When it has returned, the process ends. An error,
	// exit.Other, means that nothing has changed.
	HandOver(ctx context.Context, sessions string) error
	// Query asks the controller.
	Query(ctx context.Context, q Query) (QueryResult, error)
	// Reserve sends a reservation command, and returns the data with those of a report.
	Reserve(ctx context.Context, r Reservation) ([]byte, error)
	// Reset ends the controller's association, and returns when the next one is in use.
	Reset(ctx context.Context) error
	// Rescan has the namespaces looked at.
	Rescan(ctx context.Context) error
	// AddPath and RemovePath change the paths to the subsystem.
	AddPath(ctx context.Context, r PathRequest) error
	RemovePath(ctx context.Context, r PathRequest) error
	// SetPolicy changes how a request chooses its path.
	SetPolicy(ctx context.Context, r PolicyRequest) error
	// Reauthenticate authenticates the connection again.
	Reauthenticate(ctx context.Context, r Reauthentication) error
}

// Replaceable is a Controlled that can start another build of the program in its place.
type Replaceable interface {
	// Replace starts program, and returns its process id when it has begun to take over.
	// An error means that nothing has changed.
	Replace(ctx context.Context, program string) (pid int, err error)
}

type replaceRequest struct {
	Program string `json:"program"`
}

type replaceAnswer struct {
	PID int `json:"pid"`
}

type handOverRequest struct {
	Sessions string `json:"sessions,omitempty"`
}

type disconnectRequest struct {
	Force bool `json:"force"`
}

// Bounds on what clients may keep busy.
const (
	maxClients = 32 // at a time; more of them wait to be accepted
	maxHeader  = 4096
	maxBody    = 4096
	// maxReservation is room for the zeroes of the longest report.
	maxReservation = 8192
)

// What a client gets to send a request, and to read the answer. Tests have less time.
var readTimeout, answerTimeout = 5 * time.Second, 5 * time.Second

// Listen makes the socket, for the calling user and root only. It accepts maxClients
// connections at a time.
func Listen(path string) (net.Listener, error) {
	l, err := rundir.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	return Limit(l), nil
}

// Limit makes a listener accept maxClients connections at a time.
func Limit(l net.Listener) net.Listener {
	return &limited{Listener: l, free: make(chan struct{}, maxClients), closed: make(chan struct{})}
}

// limited is a listener with a bound on accepted connections that are open.
type limited struct {
	net.Listener
	free   chan struct{} // holds a token for each connection
	closed chan struct{}
	once   sync.Once // of closed
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &counted{Conn: c, release: sync.OnceFunc(func() { <-l.free })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// counted is a connection of a limited listener.
type counted struct {
	net.Conn
	release func()
}

func (c *counted) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// NewServer answers requests for c. Serve it on what Listen gave; Shutdown it to
// let the last answers out.
func NewServer(c Controlled, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		Answer(w, http.StatusOK, c.Status())
	})
	mux.HandleFunc("POST /v1/disconnect", func(w http.ResponseWriter, r *http.Request) {
		var req disconnectRequest
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&req); err != nil {
			answerError(w, exit.Errorf(exit.Usage, "disconnect: %v", err))
			return
		}
		// The client may give up, ending must not.
		if err := c.Disconnect(context.WithoutCancel(r.Context()), req.Force); err != nil {
			answerError(w, err)
			return
		}
		Answer(w, http.StatusOK, struct{}{})
	})
	mux.HandleFunc("POST /v1/handover", func(w http.ResponseWriter, r *http.Request) {
		var req handOverRequest
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&req)
		if err != nil && !errors.Is(err, io.EOF) { // older versions send nothing
			answerError(w, exit.Errorf(exit.Usage, "handover: %v", err))
			return
		}
		if e := exit.From(c.HandOver(context.WithoutCancel(r.Context()), req.Sessions)); e != nil {
			Answer(w, http.StatusConflict, e)
			return
		}
		Answer(w, http.StatusOK, struct{}{})
	})
	mux.HandleFunc("POST /v1/query", func(w http.ResponseWriter, r *http.Request) {
		var q Query
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&q); err != nil {
			answerError(w, exit.Errorf(exit.Usage, "query: %v", err))
			return
		}
		a, err := c.Query(r.Context(), q)
		if err != nil {
			answerError(w, err)
			return
		}
		Answer(w, http.StatusOK, a)
	})
	mux.HandleFunc("POST /v1/reservation", func(w http.ResponseWriter, r *http.Request) {
		var req Reservation
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxReservation)).Decode(&req); err != nil {
			answerError(w, exit.Errorf(exit.Usage, "reservation: %v", err))
			return
		}
		data, err := c.Reserve(r.Context(), req)
		if err != nil {
			answerError(w, err)
			return
		}
		Answer(w, http.StatusOK, QueryResult{Data: data})
	})
	mux.HandleFunc("POST /v1/reauth", func(w http.ResponseWriter, r *http.Request) {
		var req Reauthentication
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&req); err != nil {
			answerError(w, exit.Errorf(exit.Usage, "reauth: the request makes no sense")) // err may quote it
			return
		}
		if err := c.Reauthenticate(context.WithoutCancel(r.Context()), req); err != nil {
			answerError(w, err)
			return
		}
		Answer(w, http.StatusOK, struct{}{})
	})
	for path, act := range map[string]func(context.Context) error{"POST /v1/reset": c.Reset, "POST /v1/rescan": c.Rescan} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if err := act(r.Context()); err != nil {
				answerError(w, err)
				return
			}
			Answer(w, http.StatusOK, struct{}{})
		})
	}
	handle(mux, "POST /v1/path/add", c.AddPath)
	handle(mux, "POST /v1/path/remove", c.RemovePath)
	handle(mux, "POST /v1/policy", c.SetPolicy)
	if r, ok := c.(Replaceable); ok {
		mux.HandleFunc("POST /v1/replace", func(w http.ResponseWriter, req *http.Request) { replace(w, req, r) })
	}
	srv := &http.Server{
		Handler:        mux,
		ReadTimeout:    readTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	srv.SetKeepAlivesEnabled(false) // each request has a connection of its own
	return srv
}

// handle answers requests of one kind that have no result.
func handle[T any](mux *http.ServeMux, pattern string, act func(context.Context, T) error) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var req T
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&req); err != nil {
			answerError(w, exit.Errorf(exit.Usage, "%s: the request makes no sense", r.URL.Path)) // err may quote a key
			return
		}
		if err := act(context.WithoutCancel(r.Context()), req); err != nil {
			answerError(w, err)
			return
		}
		Answer(w, http.StatusOK, struct{}{})
	})
}

func replace(w http.ResponseWriter, req *http.Request, r Replaceable) {
	var body replaceRequest
	err := json.NewDecoder(http.MaxBytesReader(w, req.Body, maxBody)).Decode(&body)
	if err == nil && !filepath.IsAbs(body.Program) {
		err = fmt.Errorf("program %q: want an absolute path", body.Program)
	}
	if err != nil {
		answerError(w, exit.Errorf(exit.Usage, "replace: %v", err))
		return
	}
	pid, err := r.Replace(context.WithoutCancel(req.Context()), body.Program)
	if err != nil {
		answerError(w, err)
		return
	}
	Answer(w, http.StatusOK, replaceAnswer{pid})
}

// answerError writes the error of a request that was refused.
func answerError(w http.ResponseWriter, err error) {
	e := exit.From(err)
	code := http.StatusInternalServerError
	switch e.Code {
	case exit.Usage:
		code = http.StatusBadRequest
	case exit.Busy:
		code = http.StatusConflict
	}
	Answer(w, code, e)
}

// Answer writes body as JSON. A client that does not read it is given up.
func Answer(w http.ResponseWriter, code int, body any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout)) // of a real connection
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client is gone: nobody to tell
}
