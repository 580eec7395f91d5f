package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/discovery"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
)

// probe is what is known of the target from connecting to it: first to its discovery
// service, then to the subsystem.
type probe struct {
	provider rdma.Provider
	service  *initiator.Subsystem // of the discovery service
	refusal  error                // why there is none, although the target answers
	loops    []*poller.Loop
	sub      *initiator.Subsystem // of the subsystem
	broken   bool                 // a step has failed, and no later one is made
	failed   Check                // the step of connecting to the subsystem that failed
	err      error                // and why
}

// closeTime limits the end of a connection.
const closeTime = 5 * time.Second

// end closes everything. What was only tried need not end in order.
func (p *probe) end() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	for _, c := range []*initiator.Subsystem{p.sub, p.service} {
		if c != nil {
			_ = c.Close(ctx)
		}
	}
	for _, l := range p.loops {
		_ = l.Stop()
	}
	if c, ok := p.provider.(io.Closer); ok {
		_ = c.Close()
	}
}

// fail ends the probe with a failure.
func (p *probe) fail(m *Machine, nqn string, err error) Result {
	p.broken = true
	explained := exit.Connecting(m.way.remote.String(), nqn, m.Options.HostNQN, err)
	return fail(explained.Code, m.remedy(explained.Code), "%s", explained.Message)
}

// remedy is what to do after a failure of a step.
func (m *Machine) remedy(code exit.Code) string {
	switch code {
	case exit.Unreachable:
		return "check the address, the routes, and that the machine runs (ping " + m.way.remote.Addr().String() + ")"
	case exit.Rejected:
		return "start the target, or check its port (-s); its log may say why it rejected"
	case exit.UnknownSubsys:
		return "check -n; \"ublk-nvmeof discover\" shows what this host may use"
	case exit.HostNotAllowed:
		return "let the target admit host NQN " + m.Options.HostNQN
	case exit.NotProved:
		return "check the keys of host and target (--dhchap-secret, --dhchap-ctrl-secret)"
	case exit.Timeout:
		return "check that the target runs, that UDP port 4791 is open on the way, and that the whole path has the MTU of both ends"
	case exit.NoRDMA:
		return "load the driver of the adapter (ib_uverbs, rdma_ucm), or use --provider roce"
	case exit.Permission:
		return "become root, or use --provider roce"
	}
	return "see the log of the target"
}

// config is how to connect.
func (m *Machine) config(nqn string) initiator.Config {
	o := m.Options
	return initiator.Config{
		Path: initiator.Path{Provider: m.probe.provider, Address: m.way.remote, Source: o.SourceAddr}, SubNQN: nqn,
		HostNQN: o.HostNQN, HostID: o.HostID, TOS: o.TOS,
		Credentials: initiator.Credentials{Host: o.Secret, Controller: o.ControllerSecret},
	}
}

// fromConnection reports whether the target could not even be connected to by RDMA.
func fromConnection(err error) bool {
	var step *rdma.StepError
	var reject *rdma.RejectError
	return errors.As(err, &step) || errors.As(err, &reject)
}

// connection connects to the target by RDMA, in order to ask its discovery service.
type connection struct{}

func (connection) Name() string { return "connection" }

func (connection) Look(ctx context.Context, m *Machine) Result {
	if m.way == nil {
		return Result{}
	}
	p := &probe{}
	m.probe = p
	loading := m.loadForVerbs()
	var err error
	if p.provider, err = provider.ForHost(m.way.choice.Name); err != nil {
		return p.fail(m, nvme.DiscoveryNQN, errors.Join(err, loading))
	}
	p.service, err = discovery.Open(ctx, m.config(nvme.DiscoveryNQN))
	switch {
	case err == nil:
		return ok("%s by RDMA device %s", m.way.remote, p.service.Info().Paths[0].Device)
	case fromConnection(err), exit.Of(err) == exit.NoRDMA, exit.Of(err) == exit.Permission:
		return p.fail(m, nvme.DiscoveryNQN, err)
	}
	p.refusal = err
	return ok("%s by --provider %s", m.way.remote, m.way.choice.Name)
}

// loadForVerbs loads what an RDMA device needs, as connect does.
func (m *Machine) loadForVerbs() error {
	if m.way.choice.Name != options.Verbs || m.Options.LoadModules != "auto" {
		return nil
	}
	var errs []error
	for _, module := range []host.Module{host.IBUverbs, host.RDMAUCM} {
		if !module.Present() {
			errs = append(errs, module.Load())
		}
	}
	return errors.Join(errs...)
}

// probing reports whether the steps up to now have worked.
func (m *Machine) probing() bool { return m.probe != nil && !m.probe.broken }

// discoveryLog reads what the target lists for this host.
type discoveryLog struct{}

func (discoveryLog) Name() string { return "discovery" }

func (discoveryLog) Look(ctx context.Context, m *Machine) Result {
	if !m.probing() {
		return Result{}
	}
	p, nqn := m.probe, m.Options.NQN
	if p.service == nil {
		if nqn != "" {
			return warn("", "the target does not offer discovery here: %v", p.refusal)
		}
		return p.fail(m, nvme.DiscoveryNQN, p.refusal)
	}
	log, err := discovery.Read(ctx, p.service, discovery.Limits{})
	if err != nil {
		return p.fail(m, nvme.DiscoveryNQN, fmt.Errorf("read the discovery log: %w", err))
	}
	var names []string
	for i := range log.Entries {
		if e := &log.Entries[i]; e.SUBTYPE() == nvme.SubsystemNVMe {
			names = append(names, e.NQN())
			if e.NQN() == nqn {
				return ok("the target lists %s", nqn)
			}
		}
	}
	const most = 5
	listed := fmt.Sprintf("the target lists %s for this host", english.Plural(len(names), "subsystem", ""))
	if len(names) > most {
		names = append(names[:most:most], "…")
	}
	if len(names) > 0 {
		listed += ": " + strings.Join(names, ", ")
	}
	if nqn != "" {
		return warn("check -n, the port (-s), and whether the subsystem admits host NQN "+m.Options.HostNQN, "%s, and not %s", listed, nqn)
	}
	return ok("%s", listed)
}

// adminConnect connects to the subsystem. It makes all later steps as well; they only
// report.
type adminConnect struct{}

func (adminConnect) Name() string { return "admin_connect" }

func (c adminConnect) Look(ctx context.Context, m *Machine) Result {
	if !m.probing() || m.Options.NQN == "" {
		return Result{}
	}
	p := m.probe
	if err := m.connect(ctx); err != nil {
		p.failed, p.err = stepOf(err), err
		if p.failed == c {
			return p.fail(m, m.Options.NQN, err)
		}
		return ok("the target made a controller of %s for host NQN %s", m.Options.NQN, m.Options.HostNQN)
	}
	return ok("the target made controller %d of %s for host NQN %s", p.sub.Info().Paths[0].CNTLID, m.Options.NQN, m.Options.HostNQN)
}

// connect connects to the subsystem as a server does, but makes no devices.
func (m *Machine) connect(ctx context.Context) error {
	p, o := m.probe, m.Options
	for range m.loops() {
		l, err := poller.New(poller.Config{Name: "nvmeof-doctor"})
		if err != nil {
			return process.ExplainMemlock(err)
		}
		p.loops = append(p.loops, l)
	}
	cfg := m.config(o.NQN)
	cfg.Queues, cfg.Loops, cfg.QueueSize = o.Queues, p.loops, o.QueueSize
	cfg.KeepAlive, cfg.DisableSQFlow = o.KeepAlive, o.DisableSQFlow
	var err error
	p.sub, err = initiator.Connect(ctx, cfg)
	return err
}

// stepOf returns the check that a failed step of connecting belongs to.
func stepOf(err error) Check {
	var step *initiator.StepError
	if errors.As(err, &step) {
		switch step.Step {
		case "enable controller", "keep controller alive":
			return enable{}
		case "identify controller":
			return identify{}
		case "negotiate I/O queues", "connect I/O queues":
			return queues{}
		case "configure events", "identify namespaces":
			return namespaces{}
		}
	}
	return adminConnect{}
}

// step reports a later step: as worked says, unless this step or one before it has failed.
func (m *Machine) step(c Check, worked func(initiator.PathInfo) Result) Result {
	switch {
	case !m.probing() || m.Options.NQN == "":
		return Result{}
	case m.probe.failed == c:
		return m.probe.fail(m, m.Options.NQN, m.probe.err)
	case m.probe.sub == nil:
		return ok("done")
	}
	return worked(m.probe.sub.Info().Paths[0])
}

// enable reports whether the controller became ready.
type enable struct{}

func (enable) Name() string { return "enable" }

func (c enable) Look(_ context.Context, m *Machine) Result {
	return m.step(c, func(i initiator.PathInfo) Result { return ok("the controller is ready, NVMe %v", i.Version) })
}

// identify reports who the controller is.
type identify struct{}

func (identify) Name() string { return "identify" }

func (c identify) Look(_ context.Context, m *Machine) Result {
	return m.step(c, func(i initiator.PathInfo) Result {
		return ok("model %q, serial number %q, firmware %q", i.Model, i.Serial, i.Firmware)
	})
}

// queues compares the queues that the target grants with those that were asked for.
type queues struct{}

func (queues) Name() string { return "queues" }

func (c queues) Look(_ context.Context, m *Machine) Result {
	return m.step(c, func(i initiator.PathInfo) Result {
		granted := fmt.Sprintf("%d of %d I/O queues granted, of %d entries", i.Plan.Granted, i.Plan.Requested.Total(), i.QueueSize)
		if i.Plan.Granted < i.Plan.Requested.Total() {
			return warn("raise the queue limit of the target, or ask for fewer queues (-i, -W, -P)", "%s: queues are shared", granted)
		}
		return ok("%s", granted)
	})
}

// namespaces reports what could be served.
type namespaces struct{}

func (namespaces) Name() string { return "namespaces" }

func (c namespaces) Look(_ context.Context, m *Machine) Result {
	return m.step(c, func(initiator.PathInfo) Result {
		var found []string
		for _, ns := range m.probe.sub.Namespaces() {
			found = append(found, fmt.Sprintf("%d (%s)", ns.NSID(), humanize.IBytes(ns.Geometry().Sectors<<block.SectorShift)))
		}
		if len(found) == 0 {
			return fail(exit.NotFound, "add a namespace at the target", "%s has no namespace that can be used", m.Options.NQN)
		}
		return ok("%s: %s", english.Plural(len(found), "namespace", ""), strings.Join(found, ", "))
	})
}
