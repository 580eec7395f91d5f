package discovery

import (
	"context"
	"errors"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// Open connects to a discovery controller. cfg needs what initiator.Connect needs, but for
// queues and loops; SubNQN is nvme.DiscoveryNQN if it is empty. Errors are those of
// initiator.Connect.
func Open(ctx context.Context, cfg initiator.Config) (*initiator.Subsystem, error) {
	cfg.Discovery = true
	if cfg.SubNQN == "" {
		cfg.SubNQN = nvme.DiscoveryNQN
	}
	return initiator.Connect(ctx, cfg)
}

// OpenUnique is Open for a connection that is kept. A service that has a name of its own
// beside the well-known one is connected to by that name, if it accepts it: hosts and the
// service itself know such a connection by it.
func OpenUnique(ctx context.Context, cfg initiator.Config) (*initiator.Subsystem, error) {
	c, err := Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	id, err := c.Identify()
	if err != nil {
		return nil, errors.Join(err, c.Close(ctx))
	}
	nqn := id.SUBNQN()
	if cfg.SubNQN != "" && cfg.SubNQN != nvme.DiscoveryNQN || nqn == nvme.DiscoveryNQN || nvme.ValidateNQN(nqn) != nil {
		return c, nil
	}
	cfg.SubNQN = nqn
	unique, err := Open(ctx, cfg)
	if err != nil {
		return c, nil
	}
	_ = c.Close(ctx) // a service that is not left in order notices the end of the connection
	return unique, nil
}
