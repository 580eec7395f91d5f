package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
)

// NVMeController identifies a controller of an NVMe over RDMA target.
type NVMeController struct {
	Address       netip.AddrPort // of the target
	NQN           string         // of the subsystem
	HostNQN       string         // of the host for which the target made it
	CNTLID        uint16
	Serial, Model string // of the subsystem, as in Identify Controller
}

// KernelNVMe looks at the controllers of the kernel's NVMe initiator. Any goroutine may use
// it.
type KernelNVMe struct {
	class  string // directory of sysfs with a directory for each controller
	proc   string // directory of procfs
	open   func(name string) (nvmeDevice, error)
	asking chan struct{} // holds a token while a controller is asked
}

// nvmeDevice is an open device of the kernel's initiator. The kernel does not give its
// number to another controller while it is open (nvme_free_ctrl in drivers/nvme/host/core.c).
type nvmeDevice interface {
	// Number returns the device number, as in the attribute dev.
	Number() (string, error)
	// Identify has the target execute Identify Controller. It may take as long as the
	// kernel takes to find out that the target does not answer.
	Identify() (*nvme.IdentifyController, error)
	Close() error
}

// NewKernelNVMe returns a KernelNVMe of this host.
func NewKernelNVMe() *KernelNVMe {
	return &KernelNVMe{class: "/sys/class/nvme", proc: "/proc", open: openNVMe, asking: make(chan struct{}, 1)}
}

// Has reports whether the target certainly has c now, as a controller of the kernel's
// initiator. sysfs alone does not prove it: the kernel calls a controller live until it
// notices that the target does not answer. So the controller itself has to execute Identify
// Controller after Has was called, and to say that it is c. That needs root. Has returns
// false if c is not found, if there is doubt, or when ctx is done.
func (k *KernelNVMe) Has(ctx context.Context, c NVMeController) bool {
	// A controller that does not answer blocks the goroutine, so there is only one.
	select {
	case k.asking <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	found := make(chan bool, 1)
	go func() {
		found <- k.has(c)
		<-k.asking
	}()
	select {
	case ok := <-found:
		return ok
	case <-ctx.Done():
		return false
	}
}

func (k *KernelNVMe) has(c NVMeController) bool {
	entries, err := os.ReadDir(k.class)
	if err != nil || len(entries) == 0 || !k.sharesNetwork() {
		return false
	}
	for _, e := range entries {
		if k.describes(e.Name(), c) && k.confirms(e.Name(), c) {
			return true
		}
	}
	return false
}

// sharesNetwork reports whether the kernel's initiator certainly reaches the same targets
// at the same addresses as this process. It is in the first network namespace
// (nvme_rdma_alloc_queue in drivers/nvme/host/rdma.c), where kernel threads are, too.
func (k *KernelNVMe) sharesNetwork() bool {
	const kthreadd = "2"
	name, err := os.ReadFile(filepath.Join(k.proc, kthreadd, "comm"))
	if err != nil || strings.TrimSpace(string(name)) != "kthreadd" {
		return false // a container with process ids of its own
	}
	kernel, err := os.Readlink(filepath.Join(k.proc, kthreadd, "ns/net"))
	if err != nil {
		return false
	}
	own, err := os.Readlink(filepath.Join(k.proc, "self/ns/net"))
	return err == nil && own == kernel
}

// describes reports whether a controller is live and c according to sysfs.
func (k *KernelNVMe) describes(name string, c NVMeController) bool {
	for attr, want := range map[string]string{
		"state": "live", "transport": "rdma", "subsysnqn": c.NQN, "hostnqn": c.HostNQN, "cntlid": strconv.Itoa(int(c.CNTLID)),
	} {
		if got, err := k.attr(name, attr); err != nil || got != want {
			return false
		}
	}
	text, err := k.attr(name, "address")
	address, ok := parseAddress(text)
	return err == nil && ok && address == netip.AddrPortFrom(c.Address.Addr().Unmap(), c.Address.Port())
}

// confirms reports whether the target says that a controller is c.
func (k *KernelNVMe) confirms(name string, c NVMeController) bool {
	dev, err := k.open(name)
	if err != nil {
		return false
	}
	defer func() { _ = dev.Close() }() // it was only read from
	// The name may have become another controller's before it was opened.
	number, err := dev.Number()
	if err != nil {
		return false
	}
	if listed, err := k.attr(name, "dev"); err != nil || listed != number || !k.describes(name, c) {
		return false
	}
	id, err := dev.Identify()
	return err == nil && id.CNTLID() == c.CNTLID && id.SN() == c.Serial && id.MN() == c.Model
}

func (k *KernelNVMe) attr(name, attr string) (string, error) {
	text, err := os.ReadFile(filepath.Join(k.class, name, attr))
	return strings.TrimSpace(string(text)), err
}

// parseAddress returns the target's address in an attribute address, such as
// "traddr=192.0.2.1,trsvcid=4420,src_addr=192.0.2.2" (nvmf_get_address in
// drivers/nvme/host/fabrics.c).
func parseAddress(text string) (netip.AddrPort, bool) {
	fields := map[string]string{}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		fields[key] = value
	}
	addr, err := netip.ParseAddr(fields["traddr"])
	port, perr := strconv.ParseUint(fields["trsvcid"], 10, 16)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), err == nil && perr == nil
}

// openNVMe opens a controller of the kernel's initiator. The kernel refuses to open one
// that is not live.
func openNVMe(name string) (nvmeDevice, error) {
	f, err := os.OpenFile(filepath.Join("/dev", name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return nvmeFile{f}, nil
}

// nvmeFile is the file of a controller, /dev/nvmeN.
type nvmeFile struct{ *os.File }

// Number implements nvmeDevice.
func (f nvmeFile) Number() (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return "", errors.New(f.Name() + " is no character device")
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

// adminCommand is struct nvme_admin_cmd of linux/nvme_ioctl.h.
type adminCommand struct {
	opcode, flags       uint8
	_                   uint16
	nsid, cdw2, cdw3    uint32
	metadata, addr      uint64
	metadataLen, length uint32
	cdw10               uint32
	_                   [5]uint32 // cdw11 to cdw15
	timeoutMS, result   uint32
}

// ioctlAdminCmd is NVME_IOCTL_ADMIN_CMD, _IOWR('N', 0x41, struct nvme_admin_cmd).
const ioctlAdminCmd = 3<<30 | unsafe.Sizeof(adminCommand{})<<16 | 'N'<<8 | 0x41

// Identify implements nvmeDevice.
func (f nvmeFile) Identify() (*nvme.IdentifyController, error) {
	id := new(nvme.IdentifyController)
	var pinner runtime.Pinner
	pinner.Pin(id) // the kernel gets its address in a field
	defer pinner.Unpin()
	cmd := adminCommand{
		opcode: uint8(nvme.AdminIdentify), cdw10: uint32(nvme.CNSController),
		addr: uint64(uintptr(unsafe.Pointer(id))), length: nvme.IdentifySize,
	}
	status, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlAdminCmd, uintptr(unsafe.Pointer(&cmd)))
	runtime.KeepAlive(f.File)
	switch {
	case errno != 0:
		return nil, fmt.Errorf("identify %s: %w", f.Name(), errno)
	case status != 0: // a status of NVMe, not of the system
		return nil, fmt.Errorf("identify %s: status %#x", f.Name(), status)
	}
	return id, nil
}
