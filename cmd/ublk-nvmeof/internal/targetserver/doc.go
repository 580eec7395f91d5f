// Package targetserver is the process of ublk-nvmeof target: a target of
// package target with its subsystems, and a control socket to change it, and to
// make it misbehave, while it runs.
//
//	/run/ublk-nvmeof/target0/             locked (flock) by the process
//	/run/ublk-nvmeof/target0/control.sock HTTP and JSON, see [Client]
package targetserver
