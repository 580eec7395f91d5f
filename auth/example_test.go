package auth_test

import (
	"fmt"

	"ublk-nvmeof/auth"
)

// A host and a controller prove to each other that they have their keys. The messages go
// from one to the other by themselves here; a host sends them by Authentication Send, and
// asks for them by Authentication Receive.
func Example() {
	hostKey, err := auth.GenerateKey(auth.SHA256, 32)
	if err != nil {
		fmt.Println(err)
		return
	}
	controllerKey, err := auth.GenerateKey(auth.NoHash, 48)
	if err != nil {
		fmt.Println(err)
		return
	}
	const hostNQN, subNQN = "nqn.2026-01.org.example:host", "nqn.2026-01.org.example:disk"
	host, err := auth.NewHost(auth.HostConfig{HostNQN: hostNQN, SubNQN: subNQN, Key: hostKey, ControllerKey: controllerKey, Transaction: 1})
	if err != nil {
		fmt.Println(err)
		return
	}
	controller := auth.NewController(auth.ControllerConfig{
		HostNQN: hostNQN, SubNQN: subNQN, Key: hostKey, ControllerKey: controllerKey,
		Groups: []auth.Group{auth.FFDHE3072},
	})
	for send := host.Negotiate(); send != nil; {
		controller.Take(send)
		if host.Authenticated() {
			break
		}
		if send, err = host.Next(controller.Give()); err != nil {
			fmt.Println(err)
			return
		}
	}
	fmt.Println(host.Authenticated(), controller.Authenticated())
	fmt.Println(host.Method())
	// Output:
	// true true
	// sha512 ffdhe3072
}
