package control

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
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

type disconnectRequest struct {
	Force bool `json:"force"`
}

// Bounds on what a client may keep busy.
const (
	headerTimeout = 5 * time.Second
	maxBody       = 4096
)

// Listen makes the socket, for the calling user and root only.
func Listen(path string) (net.Listener, error) {
	l, err := rundir.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	return l, nil
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
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// Answer writes body as JSON.
func Answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client is gone: nobody to tell
}
