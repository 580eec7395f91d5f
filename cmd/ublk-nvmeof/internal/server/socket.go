package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// answerTime is the time limit for the answer to a control request.
const answerTime = time.Second

// socket is the control socket while it is served.
type socket struct {
	http   *http.Server
	served chan error
}

func (s *server) listen() error {
	l, err := control.Listen(s.record.socket())
	if err != nil {
		return err
	}
	sock := &socket{control.NewServer(s, s.log), make(chan error, 1)}
	go func(l net.Listener) { sock.served <- sock.http.Serve(l) }(l)
	s.sock = sock
	return nil
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
	return err
}
