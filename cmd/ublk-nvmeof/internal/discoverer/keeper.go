package discoverer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/rundir"
)

// keeperPrefix begins the names of processes that stay connected to discovery services.
const keeperPrefix = "discovery"

const keeperFile = "keeper.json"

// maxKeeper is far above the record of a keeper.
const maxKeeper = 1 << 20

// Keeper is a process that stays connected to discovery services.
type Keeper struct {
	Name     string        `json:"name"`
	Process  state.Process `json:"process"`
	Services []Kept        `json:"services"`
}

// Kept is a service that a keeper stays connected to.
type Kept struct {
	Address string `json:"address"` // as it was given, with the port
	NQN     string `json:"subsysnqn"`
	HostNQN string `json:"hostnqn"`
	HostID  string `json:"hostid"`
}

// kept describes a service.
func (s Service) kept() Kept {
	c := s.Options.Connect
	return Kept{c.Peer(), c.NQN, c.HostNQN, c.HostID.String()}
}

// Keep makes the calling process the keeper of services. The caller leaves the place at the
// end.
func Keep(runDir string, services []Service) (*rundir.Place, Keeper, error) {
	self, err := state.Of(os.Getpid())
	if err != nil {
		return nil, Keeper{}, err
	}
	place, err := rundir.TakePlace(runDir, keeperPrefix)
	if err != nil {
		return nil, Keeper{}, err
	}
	k := Keeper{Name: place.Name, Process: self}
	for _, s := range services {
		k.Services = append(k.Services, s.kept())
	}
	text, err := json.Marshal(k)
	if err == nil {
		_, err = rundir.Keep(filepath.Join(place.Dir, keeperFile), append(text, '\n'), 0o644)
	}
	if err != nil {
		return nil, Keeper{}, errors.Join(err, place.Leave())
	}
	return place, k, nil
}

// Keepers finds the keepers that run.
func Keepers(runDir string) ([]Keeper, error) {
	names, err := rundir.Places(runDir, keeperPrefix)
	if err != nil {
		return nil, err
	}
	var all []Keeper
	for _, name := range names {
		f, err := rundir.OpenFile(filepath.Join(runDir, name, keeperFile), os.O_RDONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just begun, or is about to end
		}
		if err != nil {
			return nil, err
		}
		var k Keeper
		err = json.NewDecoder(io.LimitReader(f, maxKeeper)).Decode(&k)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		k.Name = name
		all = append(all, k)
	}
	return all, nil
}

// Unkept returns the services that no keeper stays connected to.
func Unkept(keepers []Keeper, services []Service) (out []Service) {
	for _, s := range services {
		if !slices.ContainsFunc(keepers, func(k Keeper) bool { return slices.Contains(k.Services, s.kept()) }) {
			out = append(out, s)
		}
	}
	return out
}

// End ends a keeper and waits until it has ended.
func (k Keeper) End(ctx context.Context) error {
	p, err := k.Process.Open()
	switch {
	case errors.Is(err, os.ErrProcessDone):
		return nil
	case err != nil:
		return err
	}
	defer p.Close()
	if err := p.Terminate(); err != nil {
		return fmt.Errorf("end process %d: %w", k.Process.PID, err)
	}
	return p.Wait(ctx)
}
