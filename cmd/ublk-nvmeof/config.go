package main

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/configfile"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/identity"
)

func newConfig(runDir dirFunc) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Show and write connections as the configuration of nvme-cli",
		Long: `Works with config.json, the configuration of nvme-cli 2, which connect-all reads. Flags
that nvme-cli does not have, such as --frontend, have no place in it.`,
		Args: noArgs,
	}
	cmd.AddCommand(newConfigShow(runDir), newConfigWrite(runDir), newConfigConvert())
	return cmd
}

func newConfigShow(runDir dirFunc) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Print the connections of the servers that run",
		Long: `Prints the connections of all servers that run, and of the processes that stay connected
to discovery services.`,
		Args: noArgs,
		RunE: verb("config show", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			f := configfile.New()
			_, err = addRunning(f, dir)
			_, werr := io.WriteString(cmd.OutOrStdout(), output.EscapeJSON(string(f.Bytes())))
			return errors.Join(err, werr)
		}),
	}
}

func newConfigWrite(runDir dirFunc) *cobra.Command {
	file := options.DefaultConfig
	cmd := &cobra.Command{
		Use:   "write",
		Short: "Add the connections of the servers that run to the configuration",
		Long: `Adds what config show prints to a file, so that connect-all connects it again. Everything
else in the file stays as it is. If the file has a connection already, its values are
replaced. The file is replaced as a whole, or not at all.`,
		Args: noArgs,
		RunE: verb("config write", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			f, err := configfile.Read(file)
			if err != nil {
				return err
			}
			n, err := addRunning(f, dir)
			if err != nil {
				return err // a file that lacks something could be taken for complete
			}
			if err := f.Write(file); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "wrote %s to %s\n", english.Plural(n, "connection", ""), file)
			return err
		}),
	}
	cmd.Flags().StringVarP(&file, "config", "J", file, "`file` to change; it is made if it does not exist")
	return cmd
}

func newConfigConvert() *cobra.Command {
	opts := options.DefaultDiscovery()
	cmd := &cobra.Command{
		Use:   "convert [FILE]",
		Short: "Print the services of discovery.conf as a configuration",
		Long: `Prints the discovery services of FILE, by default /etc/nvme/discovery.conf, in the form of
config.json. Lines without a host NQN or a host id get those of this host.`,
		Args: wantArgs(0, 1),
		RunE: verb("config convert", func(cmd *cobra.Command, args []string) error {
			if err := opts.Complete(identity.Sources{}); err != nil {
				return err
			}
			file := discoverer.ConfFile
			if len(args) > 0 {
				file = args[0]
			}
			found, err := discoverer.ReadConf(opts, file)
			if err != nil {
				return err
			}
			for _, s := range found.Skipped {
				cmd.PrintErrf("%s: config convert: %s\n", programName, output.Text(s.Error()))
			}
			f := configfile.New()
			for _, s := range found.Discovery {
				if err := f.Set(configfile.Discovery(s.Options, s.Options.Persistent)); err != nil {
					return err
				}
			}
			_, err = io.WriteString(cmd.OutOrStdout(), output.EscapeJSON(string(f.Bytes())))
			return errors.Join(append(found.Errors, err)...)
		}),
	}
	return cmd
}

// addRunning adds the connections of all servers that run, and of the processes that stay
// connected to discovery services, and returns how many there are.
func addRunning(f *configfile.File, dir state.Dir) (n int, err error) {
	var errs []error
	add := func(name string, err error, connections ...configfile.Connection) {
		for _, c := range connections {
			err = errors.Join(err, f.Set(c))
		}
		if err != nil {
			errs = append(errs, exit.Errorf(exit.Of(err), "%s: %v", name, err))
			return
		}
		n++
	}
	records, err := dir.List()
	if err != nil {
		return 0, err
	}
	for _, r := range records {
		switch {
		case r.Err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, r.Err))
		case r.Alive:
			paths, err := configfile.Connect(r.Args)
			add(r.Name, err, paths...)
		}
	}
	keepers, err := discoverer.Keepers(string(dir))
	if err != nil {
		errs = append(errs, err)
	}
	for _, k := range keepers {
		for _, s := range k.Services {
			address, port, err := net.SplitHostPort(s.Address)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", k.Name, err))
				continue
			}
			o, err := options.DefaultDiscovery().With([]string{"--traddr=" + address, "--trsvcid=" + port, "--nqn=" + s.NQN, "--hostnqn=" + s.HostNQN, "--hostid=" + s.HostID}, identity.Sources{})
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", k.Name, err))
				continue
			}
			add(k.Name, nil, configfile.Discovery(o, true))
		}
	}
	return n, errors.Join(errs...)
}
