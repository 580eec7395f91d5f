// Package systemd speaks for a server with systemd: it notifies the service manager,
// writes to the journal, takes sockets that systemd has opened, and puts servers in the
// background into scopes of their own. Where systemd does not run, it does nothing.
package systemd
