package metrics

import (
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// scrapeTime is the time limit for a scrape, including the transfer of the answer.
const scrapeTime = 10 * time.Second

// Scrapes answers GET /metrics, and nothing else, with h.
func Scrapes(h http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(scrapeTime)) // of a real connection
		h.ServeHTTP(w, r)
	})
	return mux
}

// Listen opens the address of --metrics-listen for a server that answers with h.
func Listen(address string, h http.Handler, log *slog.Logger) (*http.Server, net.Listener, error) {
	network := "tcp"
	if at, err := netip.ParseAddrPort(address); err == nil && at.Addr().Is4() {
		network = "tcp4" // 0.0.0.0 is not to mean every IPv6 address as well
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, nil, err
	}
	return &http.Server{
		Handler: h, ReadTimeout: scrapeTime, MaxHeaderBytes: 1 << 16,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}, control.Limit(l), nil
}
