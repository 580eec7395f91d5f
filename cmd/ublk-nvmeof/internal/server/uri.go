package server

import (
	"net"
	"net/url"
	"strings"
)

// exportURI is where an NBD client finds an export, with TLS if it is secure, in
// the form of the NBD project's doc/uri.md.
func exportURI(at net.Addr, name string, secure bool) string {
	u := url.URL{Scheme: "nbd", Host: at.String(), Path: "/" + name}
	if secure {
		u.Scheme = "nbds"
	}
	if at.Network() == "unix" {
		u.Scheme += "+unix"
		u.Host, u.RawQuery = "", "socket="+escapePath(at.String())
	}
	return u.String()
}

// escapePath escapes a path for the query of a URI. Clients do not take "+" for
// a space.
func escapePath(path string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(path))
}

// socketOf is the path of the socket in the URI of an export, or empty if it is
// none of a unix socket.
func socketOf(uri string) string {
	u, err := url.Parse(uri)
	if err != nil || !strings.HasSuffix(u.Scheme, "+unix") {
		return ""
	}
	return u.Query().Get("socket")
}
