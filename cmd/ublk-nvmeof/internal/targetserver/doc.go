// Package targetserver is the process of the command target. It runs a target of
// package target with its subsystems. A control socket changes the target and makes
// it misbehave while it runs.
//
//	/run/ublk-nvmeof/target0/             directory of one process
//	/run/ublk-nvmeof/target0/lock         locked (flock) by the process
//	/run/ublk-nvmeof/target0/control.sock HTTP and JSON, see [Client]
//	/run/ublk-nvmeof/target0/log          log of a target in the background
package targetserver
