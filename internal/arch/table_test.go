package arch

const module = "ublk-nvmeof"

// testenv is for the tests of every package.
const testenv = "internal/testenv"

// Modules from outside that some packages may import.
const (
	sys      = "golang.org/x/sys"
	cobra    = "github.com/spf13/cobra"
	pflag    = "github.com/spf13/pflag"
	kmod     = "github.com/pmorjan/kmod"
	rdmamap  = "github.com/Mellanox/rdmamap"
	humanize = "github.com/dustin/go-humanize"
	english  = "github.com/dustin/go-humanize/english"

	prometheus = "github.com/prometheus/client_golang"
	exposition = "github.com/prometheus/common"
	yaml       = "go.yaml.in/yaml/v2"
	gosystemd  = "github.com/coreos/go-systemd/v22"
	godbus     = "github.com/godbus/dbus/v5"
	testscript = "github.com/rogpeppe/go-internal/testscript"
)

// row says what a package may import: packages of this module by their path
// below its root, and modules from outside (with all their packages). Test
// files of the package may import testing too; nothing keeps them from being a
// host to the target that they test, but sq and cq stay apart even there.
type row struct {
	may     []string
	testing []string
}

// table is the architecture: each package of the module, and no other.
var table = map[string]row{
	// What a specification says, and the seams.
	"nvme":  {},
	"auth":  {},
	"block": {may: []string{sys}},
	"rdma":  {},

	// The data path.
	"sq":        {may: []string{"nvme", "rdma"}, testing: []string{"rdma/rdmatest", sys}},
	"cq":        {may: []string{"nvme", "rdma"}, testing: []string{"rdma/rdmatest", sys}},
	"poller":    {may: []string{"internal/spin", "internal/uring", sys}},
	"initiator": {may: []string{"auth", "nvme", "rdma", "sq", "cq", "block", "poller", "process", "internal/hostmem", "internal/loglimit", sys}, testing: []string{"rdma/rdmatest", "rdma/roce", "rdma/verbs", "target", "block/blocktest"}},

	// The front door of the library, and what it finds out about the host.
	"disk": {may: []string{"block", "identity", "initiator", "internal/frontend", "internal/iostats", "nvme", "poller", "process", "rdma", "rdma/provider", sys},
		testing: []string{"auth", "block/null", "block/ram", "rdma/rdmatest", "rdma/roce", "target"}},
	"identity": {may: []string{"internal/rundir", "nvme"}},
	"process":  {may: []string{sys}},

	"discovery": {may: []string{"nvme", "initiator"}, testing: []string{"rdma/rdmatest", "rdma/roce", "target"}},

	// RDMA providers, and the suite that all of them pass.
	"rdma/verbs":         {may: []string{"rdma", "internal/hostmem", sys}, testing: []string{"rdma/rdmatest", "rdma/verbs/prepare"}},
	"rdma/verbs/prepare": {testing: []string{"rdma/verbs"}},
	"rdma/roce":          {may: []string{"rdma", "rdma/roce/wire", "internal/hostmem", sys}, testing: []string{"internal/spin", "rdma/rdmatest"}},
	"rdma/roce/wire":     {},
	"rdma/provider":      {may: []string{"rdma", "rdma/roce", "rdma/verbs"}},
	"rdma/rdmatest":      {may: []string{"rdma", "internal/hostmem", testenv, sys}},

	// Front ends. They never see RDMA.
	"ublk":  {may: []string{"block", "poller", "internal/uring", "internal/hostmem", "internal/diskuse", "internal/frontend", "internal/iostats", sys}, testing: []string{"block/null", "block/ram"}},
	"nbd":   {may: []string{"block", "poller", "internal/uring", "internal/hostmem", "internal/acceptor", "internal/diskuse", "internal/frontend", "internal/iostats", "internal/loglimit", sys}, testing: []string{"block/null", "block/ram"}},
	"vhost": {may: []string{"block", "poller", "internal/uring", "internal/acceptor", "internal/frontend", "internal/hostmem", "internal/iostats", "internal/loglimit", sys}, testing: []string{"block/null", "block/ram", "initiator", "nvme", "rdma", "rdma/rdmatest", "rdma/roce", "target", "vhost/vhosttest"}},
	// A front end of its own, which knows nothing of the back end that it tests.
	"vhost/vhosttest": {may: []string{sys}},

	// Back ends that need no target.
	"block/null": {may: []string{"block", "internal/instant", sys}, testing: []string{"block/blocktest", "poller"}},
	"block/ram":  {may: []string{"block", "internal/hostmem", "internal/instant", sys}, testing: []string{"block/blocktest", "poller"}},

	// The test suite that all back ends pass.
	"block/blocktest": {may: []string{"block", "poller", sys}},

	// The target never sees the host's code, which it tests.
	"target": {may: []string{"auth", "nvme", "block", "rdma", "internal/loglimit", "internal/spin", sys}, testing: []string{"block/ram", "rdma/rdmatest", "initiator", "poller"}},

	"examples/diskcat": {may: []string{"disk"}, testing: []string{"rdma/roce", "target"}},
	"examples/vmm":     {may: []string{"disk", "vhost"}, testing: []string{"rdma/rdmatest", "target", "vhost/vhosttest"}},

	"examples/sharemem": {may: []string{sys}},

	"bench": {may: []string{"block", "block/null", "block/ram", "nbd", "poller", "ublk", humanize, sys}},

	"docs":              {}, // what the program reads of its documents
	"internal/rundir":   {may: []string{sys}},
	"internal/uring":    {may: []string{sys}},
	"internal/frontend": {may: []string{"block", "poller"}},
	"internal/hostmem":  {may: []string{sys}},
	"internal/diskuse":  {may: []string{sys}},
	"internal/acceptor": {may: []string{sys}},
	"internal/iostats":  {may: []string{"block", sys}},
	"internal/instant":  {may: []string{"block", "internal/hostmem", sys}},
	"internal/loglimit": {},
	"internal/spin":     {},
	"internal/arch":     {},
	testenv:             {},

	// The command. Only it, and bench, see a command line library, module
	// loading, and sizes for humans.
	"cmd/ublk-nvmeof": {may: []string{
		"auth", "identity", "process",
		"cmd/ublk-nvmeof/internal/configfile", "cmd/ublk-nvmeof/internal/control", "cmd/ublk-nvmeof/internal/discoverer", "cmd/ublk-nvmeof/internal/doctor", "cmd/ublk-nvmeof/internal/exit", "cmd/ublk-nvmeof/internal/host",
		"cmd/ublk-nvmeof/internal/metrics", "cmd/ublk-nvmeof/internal/options", "cmd/ublk-nvmeof/internal/output", "internal/rundir", "cmd/ublk-nvmeof/internal/server",
		"cmd/ublk-nvmeof/internal/smallpages", "cmd/ublk-nvmeof/internal/state", "cmd/ublk-nvmeof/internal/systemd", "cmd/ublk-nvmeof/internal/targetserver", "discovery", "initiator", "nvme", "rdma/verbs/prepare", "ublk", cobra, english, pflag, sys,
	}, testing: []string{"rdma/roce", "target", "vhost/vhosttest", testscript}},
	"cmd/ublk-nvmeof/internal/control":    {may: []string{"cmd/ublk-nvmeof/internal/exit", "internal/rundir"}},
	"cmd/ublk-nvmeof/internal/exit":       {may: []string{"block", "initiator", "nvme", "rdma"}, testing: []string{"nbd", "ublk", "vhost"}},
	"cmd/ublk-nvmeof/internal/host":       {may: []string{"nvme", kmod, rdmamap, sys}},
	"cmd/ublk-nvmeof/internal/smallpages": {},
	"cmd/ublk-nvmeof/internal/metrics":    {may: []string{"cmd/ublk-nvmeof/internal/control", prometheus, exposition}, testing: []string{yaml}},
	"cmd/ublk-nvmeof/internal/options":    {may: []string{"auth", "identity", "rdma/provider", "internal/rundir", "initiator", "nvme", "poller", "target", humanize, english, pflag}},
	"cmd/ublk-nvmeof/internal/doctor": {may: []string{
		"identity", "process", "block", "discovery", "docs", "initiator", "nvme", "poller", "rdma", "ublk", humanize, english, sys,
		"cmd/ublk-nvmeof/internal/control", "cmd/ublk-nvmeof/internal/exit", "cmd/ublk-nvmeof/internal/host",
		"cmd/ublk-nvmeof/internal/options", "rdma/provider",
	}},
	"cmd/ublk-nvmeof/internal/output":     {may: []string{"cmd/ublk-nvmeof/internal/control", "cmd/ublk-nvmeof/internal/doctor", "cmd/ublk-nvmeof/internal/targetserver", "discovery", "nvme", humanize, english}, testing: []string{"cmd/ublk-nvmeof/internal/exit"}},
	"cmd/ublk-nvmeof/internal/configfile": {testing: []string{"identity"}, may: []string{"cmd/ublk-nvmeof/internal/options", pflag}},
	"cmd/ublk-nvmeof/internal/discoverer": {may: []string{
		"identity",
		"cmd/ublk-nvmeof/internal/configfile", "cmd/ublk-nvmeof/internal/exit", "cmd/ublk-nvmeof/internal/host", "cmd/ublk-nvmeof/internal/options", "rdma/provider",
		"internal/rundir", "cmd/ublk-nvmeof/internal/state", "discovery", "initiator", "nvme", "rdma",
	}, testing: []string{pflag}},
	"cmd/ublk-nvmeof/internal/server": {may: []string{
		"auth", "block", "process", "initiator", "nbd", "nvme", "poller", "rdma", "ublk", "vhost", humanize, english, sys,
		"cmd/ublk-nvmeof/internal/control", "cmd/ublk-nvmeof/internal/exit", "cmd/ublk-nvmeof/internal/host",
		"cmd/ublk-nvmeof/internal/metrics", "cmd/ublk-nvmeof/internal/options", "rdma/provider",
		"internal/loglimit", "internal/rundir", "cmd/ublk-nvmeof/internal/state", "cmd/ublk-nvmeof/internal/systemd",
	}, testing: []string{"block/null", "vhost/vhosttest"}},
	"cmd/ublk-nvmeof/internal/targetserver": {may: []string{
		"nvme", "rdma", "target", "internal/hostmem", sys,
		"cmd/ublk-nvmeof/internal/control", "cmd/ublk-nvmeof/internal/exit", "cmd/ublk-nvmeof/internal/host",
		"cmd/ublk-nvmeof/internal/options", "rdma/provider", "internal/rundir", "cmd/ublk-nvmeof/internal/systemd",
	}, testing: []string{"initiator", "poller", "rdma/roce"}},
	"cmd/ublk-nvmeof/internal/state":   {may: []string{"cmd/ublk-nvmeof/internal/host", "cmd/ublk-nvmeof/internal/options", "internal/rundir", sys}},
	"cmd/ublk-nvmeof/internal/systemd": {may: []string{gosystemd, godbus, sys}},
}
