package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

// secretsOf returns keys for the record; nil ones are left out.
func secretsOf(host, controller *auth.Key) (s state.Secrets) {
	if host != nil {
		s.Host = host.Text()
	}
	if controller != nil {
		s.Controller = controller.Text()
	}
	return s
}

// reauthTime is how long an authentication on request may take if the request does not say.
const reauthTime = time.Minute

// Reauthenticate implements control.Controlled. The keys that the request lacks are those
// that are recorded.
func (s *server) Reauthenticate(ctx context.Context, r control.Reauthentication) error {
	sub, err := s.connected()
	if err != nil {
		return err
	}
	present, err := s.record.secrets()
	if err != nil {
		return err
	}
	var keys initiator.Credentials
	for _, k := range []struct {
		key                   **auth.Key
		flag, given, recorded string
	}{
		{&keys.Host, options.HostSecret, r.Host, present.Host},
		{&keys.Controller, options.ControllerSecret, r.Controller, present.Controller},
	} {
		text := cmp.Or(k.given, k.recorded)
		if text == "" || text == options.NoSecret {
			continue
		}
		if *k.key, err = auth.ParseKey(text); err != nil {
			return exit.Errorf(exit.Usage, "--%s: %v", k.flag, err)
		}
	}
	changed := r.Host != "" || r.Controller != ""
	s.log.Info("authentication on request", "new_keys", changed)
	within, cancel := context.WithTimeout(ctx, cmp.Or(time.Duration(r.Timeout)*time.Second, reauthTime))
	defer cancel()
	refused := sub.Reauthenticate(within, &keys)
	untried := errors.Is(refused, initiator.ErrKeysUntried)
	if refused == nil || untried || errors.Is(refused, initiator.ErrKeysAccepted) {
		used := secretsOf(keys.Host, keys.Controller)
		s.mu.Lock()
		s.keys = used
		s.mu.Unlock()
		if err := s.record.changeSecrets(used); err != nil {
			return errors.Join(refused, fmt.Errorf("the keys are in use, but recover and upgrade will not have them: %w", err))
		}
	}
	switch {
	case refused == nil:
		return nil
	case errors.As(refused, new(*initiator.AuthError)):
		if changed && !errors.Is(refused, initiator.ErrKeysAccepted) {
			refused = fmt.Errorf("%w; the keys from before stay in use", refused)
		}
		return refused
	case untried && changed:
		return exit.Errorf(exit.Busy, "%v; %v", s.explainRefusal(refused), initiator.ErrKeysUntried)
	}
	return s.explainRefusal(refused)
}
