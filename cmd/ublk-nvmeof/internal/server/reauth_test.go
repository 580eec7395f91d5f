package server

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

func newKey(t *testing.T) *auth.Key {
	t.Helper()
	k, err := auth.GenerateKey(auth.NoHash, 32)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// The keys of a connection are on record for the next server, those of the last successful
// authentication. They are in no other file.
func TestReauth(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	o.Secret = newKey(t)
	r := begin(t, w, o, dir)
	r.waitReady()
	c := r.client()
	recorded := func() state.Secrets {
		t.Helper()
		record, err := state.Dir(dir).Find("ctrl0")
		if err != nil {
			t.Fatal(err)
		}
		s, err := record.Secrets()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if got := recorded(); got != (state.Secrets{Host: o.Secret.Text()}) {
		t.Errorf("recorded %+v", got)
	}
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{}); err != nil || !w.sub.keys.Host.Equal(o.Secret) || w.sub.keys.Controller != nil {
		t.Errorf("with the same keys: %v", err)
	}
	host, controller := newKey(t), newKey(t)
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{Host: host.Text(), Controller: controller.Text()}); err != nil || !w.sub.keys.Host.Equal(host) || !w.sub.keys.Controller.Equal(controller) {
		t.Errorf("with other keys: %v", err)
	}
	want := state.Secrets{Host: host.Text(), Controller: controller.Text()}
	if got := recorded(); got != want {
		t.Errorf("recorded %+v", got)
	}
	w.sub.reauth = &initiator.AuthError{Err: errors.New("rain")}
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{Host: newKey(t).Text()}); exit.Of(err) != exit.NotProved || err.Error() != "authentication of queue 0: rain; the keys from before stay in use" {
		t.Errorf("code %d, %v", exit.Of(err), err)
	}
	w.sub.reauth = initiator.ErrNotConnected
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{}); exit.Of(err) != exit.Busy || !strings.HasPrefix(err.Error(), "the controller is not connected, it is live") {
		t.Errorf("code %d, %v", exit.Of(err), err)
	}
	host = newKey(t)
	want.Host = host.Text()
	w.sub.reauth = fmt.Errorf("%w: %w", initiator.ErrKeysUntried, initiator.ErrNotConnected)
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{Host: host.Text()}); exit.Of(err) != exit.Busy || !strings.HasSuffix(err.Error(), "; the keys will be used for the next connection") {
		t.Errorf("code %d, %v", exit.Of(err), err)
	}
	if got := recorded(); got != want {
		t.Errorf("without a connection %+v is recorded", got)
	}
	w.sub.reauth = nil
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{Host: "@/etc/passwd"}); exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), "--dhchap-secret: key: the prefix DHHC-1: is missing") {
		t.Errorf("a file: code %d, %v", exit.Of(err), err)
	}
	if got := recorded(); got != want {
		t.Errorf("after errors %+v is recorded", got)
	}
	if err := c.Reauthenticate(t.Context(), control.Reauthentication{Controller: options.NoSecret}); err != nil || w.sub.keys.Controller != nil || recorded().Controller != "" {
		t.Errorf("without a controller key: %v", err)
	}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "secrets.json" {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("DHHC-1")) {
			t.Errorf("a key is in %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	leaves(t, dir)
}
