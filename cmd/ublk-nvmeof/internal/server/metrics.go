package server

import (
	"errors"
	"net/http"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/metrics"
)

// listenForScrapes opens the address of --metrics-listen, if it was given. A server that
// takes over devices serves them even if the address is taken.
func (s *server) listenForScrapes(h http.Handler) (*socket, error) {
	address := s.opts.MetricsAddress()
	if address == "" {
		return nil, nil
	}
	srv, l, err := metrics.Listen(address, h, s.log)
	switch {
	case err == nil:
		return serveSocket(srv, l), nil
	case len(s.waiting) > 0:
		s.log.Error("metrics are not served", "address", address, "error", err)
		return nil, nil
	}
	return nil, exit.Errorf(exit.Other, "--metrics-listen %q: %v", s.opts.Metrics, err)
}

func (s *server) listen() error {
	h := metrics.Scrapes(metrics.Handler(s.Status))
	scrapes, err := s.listenForScrapes(h)
	if err != nil {
		return err
	}
	l, err := control.Listen(s.record.socket())
	if err != nil {
		return errors.Join(err, scrapes.close())
	}
	srv := control.NewServer(s, s.log)
	mux := http.NewServeMux()
	mux.Handle("/", srv.Handler)
	mux.Handle("/metrics", h)
	srv.Handler = mux
	s.sock = serveSocket(srv, l)
	s.sock.scrapes = scrapes
	return nil
}
