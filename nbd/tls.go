package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// askAnyCertificate returns a configuration that accepts the same clients as c, but does
// not send the names of the accepted authorities with the request for a certificate.
//
// If a request names authorities, a GnuTLS client sends only a certificate that one of
// them has issued, and whose key matches a signature algorithm of the request. It
// interprets rsa_pss_rsae_sha256 and similar algorithms, the only ones that TLS 1.3
// allows for RSA keys, as algorithms of RSASSA-PSS keys. So it finds that its RSA
// certificate does not match, and sends none. If a request names no authority, a client
// with a single certificate sends it.
func askAnyCertificate(c *tls.Config) *tls.Config {
	c = c.Clone()
	if choose := c.GetConfigForClient; choose != nil {
		c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			other, err := choose(hello)
			if other == nil || err != nil {
				return other, err
			}
			return askAnyCertificate(other), nil
		}
	}
	switch c.ClientAuth {
	case tls.VerifyClientCertIfGiven:
		c.ClientAuth = tls.RequestClientCert
	case tls.RequireAndVerifyClientCert:
		c.ClientAuth = tls.RequireAnyClientCert
	default:
		return c
	}
	roots, next, now := c.ClientCAs, c.VerifyConnection, c.Time
	if now == nil {
		now = time.Now
	}
	c.ClientCAs = nil
	c.VerifyConnection = func(state tls.ConnectionState) error { // called for resumed sessions, too
		if len(state.PeerCertificates) > 0 {
			chains, err := verifyClient(state.PeerCertificates, roots, now())
			if err != nil {
				return err
			}
			state.VerifiedChains = chains
		}
		if next != nil {
			return next(state)
		}
		return nil
	}
	return c
}

// verifyClient verifies the certificates that a client has sent, in the same way as
// crypto/tls does. If roots is nil, the system's roots are used.
func verifyClient(certs []*x509.Certificate, roots *x509.CertPool, now time.Time) ([][]*x509.Certificate, error) {
	opts := x509.VerifyOptions{
		Roots: roots, CurrentTime: now, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, cert := range certs[1:] {
		opts.Intermediates.AddCert(cert)
	}
	chains, err := certs[0].Verify(opts)
	if err != nil {
		return nil, &tls.CertificateVerificationError{UnverifiedCertificates: certs, Err: err}
	}
	return chains, nil
}

// serveTLS serves a TLS client through a socket pair: the loop has one end, and two
// goroutines copy between the other end and the client.
func (s *Server) serveTLS(x *peer, secure *tls.Conn, o offer) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	file := os.NewFile(uintptr(fds[1]), "TLS")
	plain, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return errors.Join(fmt.Errorf("use socket pair: %w", err), unix.Close(fds[0]))
	}
	inner := plain.(*net.UnixConn)
	var pumps sync.WaitGroup
	pumps.Go(func() {
		_, _ = io.Copy(inner, secure)
		_ = inner.CloseWrite()
	})
	pumps.Go(func() {
		_, _ = io.Copy(secure, inner)
		_ = secure.CloseWrite()
		_ = secure.NetConn().Close() // ends the other pump
		_ = inner.Close()
	})
	err = s.transmit(x, fds[0], o, stallTicks)
	if errors.Is(err, errStalled) {
		_ = secure.NetConn().Close()
	} else { // the last replies are still on their way to the client
		_ = secure.SetWriteDeadline(time.Now().Add(s.cfg.StallTimeout))
	}
	pumps.Wait()
	return err
}
