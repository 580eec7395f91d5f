package host

import "github.com/Mellanox/rdmamap"

// RDMADevices returns the names of the RDMA devices of this host.
func RDMADevices() []string { return rdmamap.GetRdmaDeviceList() }
