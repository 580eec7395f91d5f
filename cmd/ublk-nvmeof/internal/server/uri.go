package server

import (
	"net"
	"net/url"
	"strings"
)

// exportURI returns the URI of an export for NBD clients, in the form of the NBD
// project's doc/uri.md. If secure is set, the URI is one for TLS.
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

// escapePath escapes a path for the query of a URI. Clients do not decode "+" as a
// space.
func escapePath(path string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(path))
}

// socketOf returns the path of the unix socket in the URI of an export, or "" if the
// URI has none.
func socketOf(uri string) string {
	u, err := url.Parse(uri)
	if err != nil || !strings.HasSuffix(u.Scheme, "+unix") {
		return ""
	}
	return u.Query().Get("socket")
}
