package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
)

func newReauth(runDir dirFunc) *cobra.Command {
	var host, controller *auth.Key
	timeout := time.Minute
	cmd := askVerb(runDir, "reauth DEVICE", "Authenticate a connection again, with other keys if they are given, while I/O goes on", func(cmd *cobra.Command, a *asked) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout+answerTime)
		defer cancel()
		return a.client.Reauthenticate(ctx, control.Reauthentication{
			Host:       newSecret(cmd, options.HostSecret, host),
			Controller: newSecret(cmd, options.ControllerSecret, controller),
			Timeout:    int(timeout / time.Second),
		})
	})
	cmd.Flags().Var(options.Duration(&timeout, time.Second, time.Hour), "timeout", "time limit; a connection whose target has not answered by then is made again")
	options.AddSecret(cmd.Flags(), &host, options.HostSecret, "S", "key of this host from now on: "+options.SecretWords)
	options.AddSecret(cmd.Flags(), &controller, options.ControllerSecret, "C", "key that the target must prove to have from now on")
	cmd.Long += `

After success the keys are used for later connections too, also by recover and upgrade.
After an error the keys stay as they were, unless it says that they are in use. A target may end the connection then; it is made
again with those keys. Keys that are given while there is no connection are used for the next one,
and the exit code is 14, because nothing has been authenticated yet.`
	return cmd
}

// answerTime is how long a server may take to answer beyond the time limit that it was given.
const answerTime = 10 * time.Second

// newSecret returns the value for the server: empty if the flag was not given.
func newSecret(cmd *cobra.Command, flag string, k *auth.Key) string {
	switch {
	case !cmd.Flags().Changed(flag):
		return ""
	case k == nil:
		return options.NoSecret
	}
	return k.Text()
}

// keyGenerator is the verb gen-dhchap-key.
type keyGenerator struct {
	secret string
	length int
	nqn    string
	hmac   string
}

func newGenDHCHAPKey() *cobra.Command {
	g := &keyGenerator{hmac: "0"}
	cmd := &cobra.Command{
		Use:   "gen-dhchap-key",
		Short: "Make a key for authentication, and write it to standard output",
		Long: `Makes a key for DH-HMAC-CHAP in the text form that all hosts and targets use. Whoever has
the key can pretend to be the host, so write it where only its owner can read it:

    (umask 077; ublk-nvmeof gen-dhchap-key > host.key)`,
		Args: noArgs,
		RunE: verb("gen-dhchap-key", func(cmd *cobra.Command, _ []string) error {
			k, err := g.key()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), k.Text())
			return err
		}),
	}
	f := cmd.Flags()
	f.StringVarP(&g.secret, "secret", "s", "", "secret in `hexadecimal` (default: a random one)")
	f.IntVarP(&g.length, "key-length", "l", 0, "length of the secret in `bytes`: 32, 48 or 64 (default: that of the hash, or 32)")
	f.StringVarP(&g.nqn, "nqn", "n", "", "`name` that --secret is bound to, with --hmac (default: the NQN of this host)")
	f.VarP(options.OneOf(&g.hmac, "0", "1", "2", "3"), "hmac", "m", "hash that binds the secret to a name: 0 for none, 1 for SHA-256, 2 for SHA-384, 3 for SHA-512")
	return cmd
}

// key makes the key. As in nvme-cli, a secret that is given is bound to the name once
// already, and whoever uses the key binds it once more.
func (g *keyGenerator) key() (*auth.Key, error) {
	h := auth.Hash(g.hmac[0] - '0')
	switch {
	case g.length == 0 && h == auth.NoHash:
		g.length = 32
	case g.length == 0:
		g.length = h.Size()
	}
	if g.length != 32 && g.length != 48 && g.length != 64 || h != auth.NoHash && g.length != h.Size() {
		return nil, usage(fmt.Errorf("-l/--key-length \"%d\": want 32, 48 or 64, and with --hmac the length of its hash", g.length))
	}
	if g.secret == "" {
		return auth.GenerateKey(h, g.length)
	}
	secret, err := hex.DecodeString(g.secret)
	if err != nil || len(secret) != g.length {
		return nil, usage(fmt.Errorf("-s/--secret: want %d hexadecimal digits, for the %d bytes of --key-length", 2*g.length, g.length))
	}
	k, err := auth.NewKey(h, secret)
	if err != nil || h == auth.NoHash {
		return k, err
	}
	if g.nqn == "" {
		if g.nqn, err = identity.HostNQN(identity.Sources{}); err != nil {
			return nil, err
		}
	}
	if err := nvme.ValidateNQN(g.nqn); err != nil {
		return nil, usage(fmt.Errorf("-n/--nqn %q: %w", g.nqn, err))
	}
	return auth.NewKey(h, k.Bound(g.nqn))
}

func newCheckDHCHAPKey() *cobra.Command {
	var key *auth.Key
	cmd := &cobra.Command{
		Use:   "check-dhchap-key",
		Short: "Check the form and the checksum of a key for authentication",
		Args:  noArgs,
		RunE: verb("check-dhchap-key", func(cmd *cobra.Command, _ []string) error {
			if key == nil {
				return usage(errors.New("-k/--key: no value is given; want " + options.KeyWords))
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "Key is valid (HMAC %d, length %d, CRC %08x)\n", key.Transform(), key.Size(), key.Checksum())
			return err
		}),
	}
	options.AddSecret(cmd.Flags(), &key, "key", "k", "the key: "+options.KeyWords)
	return cmd
}
