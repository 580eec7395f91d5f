package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newUdev(runDir dirFunc) *cobra.Command {
	return &cobra.Command{
		Use:    "udev DEVICE",
		Hidden: true,
		Short:  "Print the properties of a block device for udev",
		Long: `Prints what the record of a server says about a block device, as properties for
IMPORT{program} of a udev rule. It only reads records, and waits for nothing. The exit
code is 15 if no record has the device.`,
		Args: cobra.ExactArgs(1),
		RunE: verb("udev", func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := dir.List()
			if err != nil {
				return err
			}
			name := strings.TrimPrefix(args[0], "/dev/")
			for _, r := range records {
				i := slices.IndexFunc(r.Devices, func(d state.Device) bool { return d.Kind != state.NBDSocket && d.Name() == name })
				if i >= 0 {
					return writeProperties(cmd.OutOrStdout(), r.Target, r.Devices[i])
				}
			}
			return exit.Errorf(exit.NotFound, "%s: no server has it", args[0])
		}),
	}
}

// writeProperties writes the properties from which the udev rules make links. Values have
// only characters that a link may have.
func writeProperties(w io.Writer, t state.Target, d state.Device) error {
	nsid := strconv.FormatUint(uint64(d.NSID), 10)
	properties := []struct{ name, value string }{
		{"ID_BUS", "nvme"},
		{"ID_MODEL", word(d.Model)},
		{"ID_SERIAL_SHORT", word(d.Serial)},
		{"ID_NSID", nsid},
		{"UBLK_NVMEOF_NQN", word(t.NQN)},
		{"UBLK_NVMEOF_UUID", word(d.UUID)},
		{"UBLK_NVMEOF_NGUID", word(d.NGUID)},
		{"UBLK_NVMEOF_EUI64", word(d.EUI64)},
		{"ID_PATH", "nvmeof-" + word(t.NQN) + "-ns-" + nsid},
	}
	if d.Model != "" && d.Serial != "" {
		properties = append(properties, struct{ name, value string }{"ID_SERIAL", word(d.Model) + "_" + word(d.Serial) + "_" + nsid})
	}
	if id := wwid(d); id != "" {
		properties = append(properties, struct{ name, value string }{"ID_WWN", id})
	}
	for _, p := range properties {
		if p.value == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%s=%s\n", p.name, p.value); err != nil {
			return err
		}
	}
	return nil
}

// wwid is the name that Linux' own NVMe host gives to the namespace
// (wwid_show in drivers/nvme/host/sysfs.c), as far as it is made from an identifier.
func wwid(d state.Device) string {
	switch {
	case d.UUID != "":
		return "uuid." + word(d.UUID)
	case d.NGUID != "":
		return "eui." + word(d.NGUID)
	case d.EUI64 != "":
		return "eui." + word(d.EUI64)
	}
	return ""
}

// word returns s with everything replaced by an underscore that a link of udev may not
// have. Runs of spaces become one.
func word(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("#+-.:=@_", r):
			return r
		}
		return '_'
	}, strings.Join(strings.Fields(s), " "))
}
