// Command sharemem runs a program whose I/O on a ublk device is not copied. It makes memory that it
// shares with the server of the device (ublk-nvmeof connect --shmem-socket), and names it to the
// program as a file, in place of {}:
//
//	sharemem /run/disk-1.sock 64 fio --mem=mmapshared:{} --filename=/dev/ublkb0 --direct=1 …
//
// The memory has 64 MiB. It is shared until the program ends. If the server dies, its successor gets
// the memory as well. With -huge before the socket it is of huge pages, which must be reserved
// (/proc/sys/vm/nr_hugepages). The driver finds a request's place in them with fewer steps.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	huge := flag.Bool("huge", false, "use huge pages")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: sharemem [-huge] SOCKET MIB PROGRAM [ARGUMENT…]")
		os.Exit(2)
	}
	flag.Parse()
	if flag.NArg() < 3 {
		flag.Usage()
	}
	err := run(flag.Arg(0), flag.Arg(1), *huge, flag.Args()[2:])
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(max(exit.ExitCode(), 1))
	case err != nil:
		fmt.Fprintln(os.Stderr, "sharemem:", err)
		os.Exit(1)
	}
}

func run(socket, mib string, huge bool, command []string) error {
	n, err := strconv.ParseInt(mib, 10, 32)
	if err != nil || n <= 0 {
		return fmt.Errorf("%q MiB: want a number above 0", mib)
	}
	f, err := newMemory(n<<20, huge)
	if err != nil {
		return err
	}
	c, err := share(socket, f)
	if err != nil {
		return err
	}
	go keep(socket, f, c) // until the end of the process, so the memory stays open
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	for i := range command {
		command[i] = strings.ReplaceAll(command[i], "{}", path)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

// newMemory makes a memfd whose size cannot change.
func newMemory(size int64, huge bool) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge {
		flags |= unix.MFD_HUGETLB
	}
	fd, err := unix.MemfdCreate("shared", flags)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "shared memory")
	err = f.Truncate(size)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// share hands the memory to a server. It is shared as long as the connection lives.
func share(socket string, f *os.File) (*net.UnixConn, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if _, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && !strings.HasPrefix(answer, "ok ") {
		err = errors.New(strings.TrimSpace(answer))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("share memory at %s: %w", socket, err), c.Close())
	}
	return c, nil
}

// keep shares the memory with the successor of a server that has gone.
func keep(socket string, f *os.File, c *net.UnixConn) {
	for {
		_, _ = c.Read(make([]byte, 1)) // until the server has gone
		_ = c.Close()
		for range time.Tick(50 * time.Millisecond) {
			var err error
			if c, err = share(socket, f); err == nil {
				break
			}
		}
	}
}
