package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/nvme"
)

// reservationVerbs are the verbs about reservations of a namespace, with the names and flags
// of nvme-cli. Their commands go to an I/O queue.
func reservationVerbs(runDir dirFunc) []*cobra.Command {
	return []*cobra.Command{newResvReport(runDir), newResvRegister(runDir), newResvAcquire(runDir), newResvRelease(runDir)}
}

// reserve sends a reservation command and returns the data.
func (a *asked) reserve(cmd *nvme.Command, nsid uint32, data []byte) ([]byte, error) {
	return a.client.Reserve(a.ctx, control.Reservation{NSID: nsid, Command: cmd[:], Data: data})
}

func newResvReport(runDir dirFunc) *cobra.Command {
	extended := true
	var dwords uint32
	return askVerb(runDir, "resv-report DEVICE", "Show who is registered with a namespace, and who has it reserved", func(cmd *cobra.Command, a *asked) error {
		least := uint32(output.ReservationSize / 4)
		if dwords < least || dwords > nvme.IdentifySize/4 {
			return usage(fmt.Errorf("-d/--numd \"%d\": want %d to %d", dwords, least, nvme.IdentifySize/4))
		}
		nsid, err := a.namespace()
		if err != nil {
			return err
		}
		var c nvme.Command
		c.SetReservationReport(nsid, dwords*4, extended)
		report, err := a.reserve(&c, nsid, make([]byte, dwords*4))
		if err != nil {
			return err
		}
		return a.write(cmd, report, func(w io.Writer) error { return output.Reservations(w, report, extended, a.format) })
	}, namespaceFlag, rawFlag, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().Uint32VarP(&dwords, "numd", "d", nvme.IdentifySize/4, "`number` of dwords to read")
		cmd.Flags().BoolVarP(&extended, "eds", "e", true, "read the extended form, which is the only one that most targets have on a fabric")
	})
}

// reservation holds the flags of the commands that change a reservation.
type reservation struct {
	current, other uint64 // keys
	action         uint8
	kind           uint8 // of the reservation, 1 to 6
	cptpl          uint8
	ignoreKey      bool
}

func (r *reservation) addFlags(cmd *cobra.Command, action, letter, actions string) {
	f := cmd.Flags()
	f.Uint64VarP(&r.current, "crkey", "c", 0, "current reservation `key`")
	f.BoolVarP(&r.ignoreKey, "iekey", "i", false, "ignore the current key")
	f.Uint8VarP(&r.action, action, letter, 0, "`action`: "+actions)
}

func (r *reservation) kindFlag(cmd *cobra.Command) {
	cmd.Flags().Uint8VarP(&r.kind, "rtype", "t", 0,
		"`type` of the reservation: 1 write exclusive, 2 exclusive access, 3 and 4 the same for registrants only, 5 and 6 for all registrants")
}

// checkAction refuses actions that do not exist.
func (r *reservation) checkAction(flag string, last uint8) error {
	if r.action > last {
		return usage(fmt.Errorf("%s \"%d\": want 0 to %d", flag, r.action, last))
	}
	return nil
}

// checkKind refuses types that do not exist. 0 is for actions that take no type.
func (r *reservation) checkKind(optional bool) error {
	if r.kind > 6 || r.kind == 0 && !optional {
		return usage(fmt.Errorf("-t/--rtype \"%d\": want 1 to 6", r.kind))
	}
	return nil
}

// change sends a command with keys.
func (a *asked) change(set func(c *nvme.Command, nsid uint32), keys ...uint64) error {
	nsid, err := a.namespace()
	if err != nil {
		return err
	}
	var c nvme.Command
	set(&c, nsid)
	data := make([]byte, 8*len(keys))
	nvme.PutReservationKeys(data, keys...)
	_, err = a.reserve(&c, nsid, data)
	return err
}

func newResvRegister(runDir dirFunc) *cobra.Command {
	var r reservation
	return askVerb(runDir, "resv-register DEVICE", "Register a reservation key with a namespace, or take it back", func(cmd *cobra.Command, a *asked) error {
		if err := r.checkAction("-r/--rrega", 2); err != nil {
			return err
		}
		if r.cptpl > 3 {
			return usage(fmt.Errorf("-p/--cptpl \"%d\": want 0 to 3", r.cptpl))
		}
		err := a.change(func(c *nvme.Command, nsid uint32) { c.SetReservationRegister(nsid, r.action, r.ignoreKey, r.cptpl) }, r.current, r.other)
		return a.say(cmd, err, "NVME Reservation  success\n")
	}, namespaceFlag, func(cmd *cobra.Command, _ *asked) {
		r.addFlags(cmd, "rrega", "r", "0 register, 1 unregister, 2 replace")
		cmd.Flags().Uint64VarP(&r.other, "nrkey", "k", 0, "new reservation `key`")
		cmd.Flags().Uint8VarP(&r.cptpl, "cptpl", "p", 0, "`change` of what a loss of power does: 0 none, 2 reservations are released, 3 they persist")
	})
}

func newResvAcquire(runDir dirFunc) *cobra.Command {
	var r reservation
	return askVerb(runDir, "resv-acquire DEVICE", "Reserve a namespace, or preempt another host", func(cmd *cobra.Command, a *asked) error {
		if err := r.checkAction("-a/--racqa", 2); err != nil {
			return err
		}
		if err := r.checkKind(r.action > 0); err != nil {
			return err
		}
		err := a.change(func(c *nvme.Command, nsid uint32) { c.SetReservationAcquire(nsid, r.action, r.ignoreKey, r.kind) }, r.current, r.other)
		return a.say(cmd, err, "NVME Reservation Acquire success\n")
	}, namespaceFlag, func(cmd *cobra.Command, _ *asked) {
		r.addFlags(cmd, "racqa", "a", "0 acquire, 1 preempt, 2 preempt and abort")
		cmd.Flags().Uint64VarP(&r.other, "prkey", "p", 0, "reservation `key` to preempt")
		r.kindFlag(cmd)
	})
}

func newResvRelease(runDir dirFunc) *cobra.Command {
	var r reservation
	return askVerb(runDir, "resv-release DEVICE", "Release the reservation of a namespace, or clear all keys", func(cmd *cobra.Command, a *asked) error {
		if err := r.checkAction("-a/--rrela", 1); err != nil {
			return err
		}
		if err := r.checkKind(r.action == 1); err != nil {
			return err
		}
		err := a.change(func(c *nvme.Command, nsid uint32) { c.SetReservationRelease(nsid, r.action, r.ignoreKey, r.kind) }, r.current)
		return a.say(cmd, err, "NVME Reservation Release success\n")
	}, namespaceFlag, func(cmd *cobra.Command, _ *asked) {
		r.addFlags(cmd, "rrela", "a", "0 release, 1 clear")
		r.kindFlag(cmd)
	})
}

// say writes that a command succeeded.
func (a *asked) say(cmd *cobra.Command, err error, text string) error {
	if err != nil {
		return err
	}
	_, err = io.WriteString(cmd.OutOrStdout(), text)
	return err
}
