// Package doctor looks for what keeps the program from working on this machine, or from
// working well, and tries to reach a target step by step. It changes nothing, but to reach a
// target by an RDMA device it loads the modules that connect would load.
//
// Each check is a small type, and Checks is the table of them. A check looks at the machine
// through a Machine, whose files and functions tests replace.
package doctor

import (
	"context"
	"fmt"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// Status is what a check came to.
type Status string

// Statuses. The zero value means that the check does not apply.
const (
	OK   Status = "ok"
	Warn Status = "warn" // it works, but not as well or as safely as it could
	Fail Status = "fail" // connect fails, or its devices cannot be trusted
)

// Result is what a check found.
type Result struct {
	Check   string
	Status  Status
	Finding string
	Remedy  string    // what to do; empty if nothing has to be done, or nothing is known
	Code    exit.Code // the exit code that connect would have; of a Fail only
}

func ok(format string, args ...any) Result {
	return Result{Status: OK, Finding: fmt.Sprintf(format, args...)}
}

func warn(remedy, format string, args ...any) Result {
	return Result{Status: Warn, Finding: fmt.Sprintf(format, args...), Remedy: remedy}
}

func fail(code exit.Code, remedy, format string, args ...any) Result {
	return Result{Status: Fail, Finding: fmt.Sprintf(format, args...), Remedy: remedy, Code: code}
}

// Check is one thing to look at.
type Check interface {
	// Name is the name of the check in the output. It does not change.
	Name() string
	// Look looks. The caller fills in the name. A check that does not apply returns the
	// zero value.
	Look(ctx context.Context, m *Machine) Result
}

// Checks are all checks, in the order in which they are made.
var Checks = []Check{
	kernelRelease{}, ioUring{}, ublkDriver{}, ublkLimit{}, lockedMemory{}, openFiles{},
	hostIdentity{}, clonedIdentity{}, leaseTimes{},
	addresses{}, route{}, rdmaDevice{}, linkState{}, roceGID{}, mtu{}, priorities{}, udpPort{}, udpFilter{},
	connection{}, discoveryLog{}, adminConnect{}, enable{}, identify{}, queues{}, namespaces{},
}

// Names are the names of all checks.
func Names() (names []string) {
	for _, c := range Checks {
		names = append(names, c.Name())
	}
	return names
}

// Run makes all checks. The results of those that do not apply are left out, and so are
// those of checks that need one that failed.
func Run(ctx context.Context, m *Machine) []Result {
	defer m.end()
	var results []Result
	for _, c := range Checks {
		r := c.Look(ctx, m)
		if r.Status == "" {
			continue
		}
		r.Check = c.Name()
		results = append(results, r)
	}
	return results
}
