package disk

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
)

// providers are those that Open has chosen. All disks of the process share them, because only
// one user of rdma/roce at a local address gets the UDP port to which every target answers.
var providers = shared{open: map[string]*sharedProvider{}}

type shared struct {
	mu   sync.Mutex // guards what follows
	open map[string]*sharedProvider
}

type sharedProvider struct {
	rdma.Provider
	users int
}

// get returns a provider, and the function that ends its use.
func (s *shared) get(c provider.Choice) (rdma.Provider, func() error, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.open[c.Name]
	if p == nil {
		opened, err := provider.ForHost(c.Name)
		if err != nil {
			return nil, nil, fmt.Errorf("open provider %s, because %s: %w", c.Name, c.Reason, err)
		}
		p = &sharedProvider{Provider: opened}
		s.open[c.Name] = p
	}
	p.users++
	return p.Provider, func() error { return s.release(c.Name, p) }, nil
}

func (s *shared) release(name string, p *sharedProvider) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.users--; p.users > 0 {
		return nil
	}
	delete(s.open, name)
	if c, ok := p.Provider.(io.Closer); ok {
		if err := c.Close(); err != nil && !errors.Is(err, rdma.ErrClosed) {
			return fmt.Errorf("close provider %s: %w", name, err)
		}
	}
	return nil
}
