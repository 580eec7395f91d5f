package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/pmorjan/kmod"
	"golang.org/x/sys/unix"
)

// Module is a kernel module, and the device nodes that exist if it is loaded or built
// in.
type Module struct {
	Name string
	node string // pattern
}

// The modules that a server needs. The driver of the RDMA device is not among them,
// because the operator chooses it.
var (
	UblkDrv  = Module{"ublk_drv", "/dev/ublk-control"}
	NBD      = Module{"nbd", "/dev/nbd0"}
	RDMAUCM  = Module{"rdma_ucm", "/dev/infiniband/rdma_cm"}
	IBUverbs = Module{"ib_uverbs", "/dev/infiniband/uverbs*"}
)

// Present reports whether a device node of the module exists.
func (m Module) Present() bool {
	nodes, err := filepath.Glob(m.node)
	return err == nil && len(nodes) > 0
}

// Load loads the module and the modules that it depends on. It is no error if they are
// loaded already.
func (m Module) Load() error {
	k, err := kmod.New(kmod.SetInitFunc(initModule))
	if err != nil {
		return fmt.Errorf("load module %s: %w", m.Name, err)
	}
	if err := k.Load(m.Name, "", 0); err != nil {
		if errors.Is(err, kmod.ErrModuleNotFound) {
			return fmt.Errorf("load module %s: this kernel has no such module", m.Name)
		}
		return fmt.Errorf("load module %s: %w", m.Name, err)
	}
	return nil
}

// initModule makes the kernel load a file. Distributions compress their modules.
// kmod does not decompress them, and for dependencies it does not ask the kernel
// to do that either (CONFIG_MODULE_DECOMPRESS).
func initModule(path, params string, flags int) error {
	switch filepath.Ext(path) {
	case ".gz", ".xz", ".zst":
		flags |= unix.MODULE_INIT_COMPRESSED_FILE
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), params, flags)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
