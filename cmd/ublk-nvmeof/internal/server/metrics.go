package server

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/metrics"
)

// scrapeTime is the time limit for a scrape, including the transfer of the answer.
const scrapeTime = 10 * time.Second

// scrapes answers GET /metrics.
func (s *server) scrapes() http.Handler {
	metrics := metrics.Handler(s.Status)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(scrapeTime)) // of a real connection
		metrics.ServeHTTP(w, r)
	})
	return mux
}

// listenForScrapes opens the address of --metrics-listen, if it was given. A server that
// takes over devices serves them even if the address is taken.
func (s *server) listenForScrapes(h http.Handler) (*socket, error) {
	address := s.opts.MetricsAddress()
	if address == "" {
		return nil, nil
	}
	network := "tcp"
	if at, err := netip.ParseAddrPort(address); err == nil && at.Addr().Is4() {
		network = "tcp4" // 0.0.0.0 is not to mean every IPv6 address as well
	}
	l, err := net.Listen(network, address)
	switch {
	case err == nil:
	case len(s.waiting) > 0:
		s.log.Error("metrics are not served", "address", address, "error", err)
		return nil, nil
	default:
		return nil, exit.Errorf(exit.Other, "--metrics-listen %q: %v", s.opts.Metrics, err)
	}
	return serveSocket(&http.Server{
		Handler: h, ReadTimeout: scrapeTime, MaxHeaderBytes: 1 << 16,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}, control.Limit(l)), nil
}

func (s *server) listen() error {
	h := s.scrapes()
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
