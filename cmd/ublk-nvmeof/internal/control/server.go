package control

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/rundir"
)

// Controlled is what a socket controls.
type Controlled interface {
	Status() Status
	// Disconnect ends everything, and returns when it has ended. Without
	// force, a device in use makes it fail, with exit.Busy, and nothing has
	// changed.
	Disconnect(ctx context.Context, force bool) error
	// HandOver ends the service, but not the devices, which wait for another
	// server. When it has returned, the process ends. An error, exit.Other, means
	// that nothing has changed.
	HandOver(ctx context.Context) error
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

type disconnectRequest struct {
	Force bool `json:"force"`
}

// Bounds on what clients may keep busy.
const (
	maxClients = 32 // at a time; more of them wait to be accepted
	maxHeader  = 4096
	maxBody    = 4096
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
			Answer(w, http.StatusBadRequest, exit.Errorf(exit.Usage, "disconnect: %v", err))
			return
		}
		// The client may give up, ending must not.
		err := c.Disconnect(context.WithoutCancel(r.Context()), req.Force)
		switch e := exit.From(err); {
		case e == nil:
			Answer(w, http.StatusOK, struct{}{})
		case e.Code == exit.Busy:
			Answer(w, http.StatusConflict, e)
		default:
			Answer(w, http.StatusInternalServerError, e)
		}
	})
	mux.HandleFunc("POST /v1/handover", func(w http.ResponseWriter, r *http.Request) {
		if e := exit.From(c.HandOver(context.WithoutCancel(r.Context()))); e != nil {
			Answer(w, http.StatusConflict, e)
			return
		}
		Answer(w, http.StatusOK, struct{}{})
	})
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

func replace(w http.ResponseWriter, req *http.Request, r Replaceable) {
	var body replaceRequest
	err := json.NewDecoder(http.MaxBytesReader(w, req.Body, maxBody)).Decode(&body)
	if err == nil && !filepath.IsAbs(body.Program) {
		err = fmt.Errorf("program %q: want an absolute path", body.Program)
	}
	if err != nil {
		Answer(w, http.StatusBadRequest, exit.Errorf(exit.Usage, "replace: %v", err))
		return
	}
	pid, err := r.Replace(context.WithoutCancel(req.Context()), body.Program)
	if e := exit.From(err); e != nil {
		Answer(w, http.StatusConflict, e)
		return
	}
	Answer(w, http.StatusOK, replaceAnswer{pid})
}

// Answer writes body as JSON. A client that does not read it is given up.
func Answer(w http.ResponseWriter, code int, body any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout)) // of a real connection
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client is gone: nobody to tell
}
