package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

// answerTime is the time limit for the answer to a control request.
const answerTime = time.Second

// socket is a socket while it is served.
type socket struct {
	http    *http.Server
	served  chan error
	scrapes *socket // closed with this one; may be nil
}

func serveSocket(srv *http.Server, l net.Listener) *socket {
	sock := &socket{http: srv, served: make(chan error, 1)}
	go func() { sock.served <- srv.Serve(l) }()
	return sock
}

// close waits until answers in progress are written.
func (k *socket) close() error {
	if k == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	err := k.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, k.http.Close()) // a client does not read its answer
	}
	if serr := <-k.served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return errors.Join(err, k.scrapes.close())
}
