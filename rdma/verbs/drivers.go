//go:build linux && cgo && !noverbs

package verbs

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"os"
	"path/filepath"
	"strings"
	"unsafe"
)

const sysfsDevices = "/sys/class/infiniband"

// loadDrivers loads the parts of libibverbs for the devices of this host. Without them,
// libibverbs loads those for all devices that there are in the world, some 17 files with as many
// configuration files, and does so for what is missing afterwards. If the user names drivers, it
// is left to do so.
func loadDrivers() {
	if os.Getenv("RDMAV_DRIVERS") != "" || os.Getenv("IBV_DRIVERS") != "" {
		return
	}
	for _, name := range driversOf(sysfsDevices) {
		c := C.CString(name)
		C.load_driver(c)
		C.free(unsafe.Pointer(c))
	}
}

// libraries has the parts of libibverbs by the driver of the kernel.
var libraries = map[string]string{
	"mlx5_core": "mlx5", "mlx4_core": "mlx4", "bnxt_en": "bnxt_re", "cxgb4": "cxgb4", "efa": "efa", "erdma": "erdma",
	"hfi1": "hfi1verbs", "hns3": "hns", "ice": "irdma", "i40e": "irdma", "mana": "mana", "qede": "qedr",
	"ib_mthca": "mthca", "be2net": "ocrdma", "vmw_pvrdma": "vmw_pvrdma",
}

// driversOf returns the parts of libibverbs for the devices in a directory of sysfs, as far as they
// are known.
func driversOf(sysfs string) (names []string) {
	devices, _ := os.ReadDir(sysfs) // without a device there is nothing to load
	for _, d := range devices {
		dir := filepath.Join(sysfs, d.Name())
		link, _ := os.Readlink(filepath.Join(dir, "device", "driver"))
		what, _ := os.ReadFile(filepath.Join(dir, "node_desc"))
		switch name, known := libraries[filepath.Base(link)]; {
		case known:
			names = append(names, name)
		case strings.TrimSpace(string(what)) == "rxe":
			names = append(names, "rxe")
		case strings.HasPrefix(string(what), "Software iWARP"):
			names = append(names, "siw")
		}
	}
	return names
}
