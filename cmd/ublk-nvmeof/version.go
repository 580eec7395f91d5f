package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
)

// version is set when a release is built: -ldflags "-X main.version=1.2.3".
var version = ""

func thisBuild() output.Build {
	b := output.Build{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if b.Version == "" && ok {
		b.Version = info.Main.Version
	}
	if b.Version == "" {
		b.Version = "(devel)"
	}
	if ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.Commit = s.Value
			}
		}
	}
	return b
}

func newVersion() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this build",
		Args:  noArgs,
		RunE: verb("version", func(cmd *cobra.Command, _ []string) error {
			return output.Version(cmd.OutOrStdout(), programName, thisBuild(), format)
		}),
	}
	formatFlag(cmd.Flags(), &format)
	return cmd
}
