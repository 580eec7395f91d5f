package systemd

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// firstListener is the descriptor of the first socket that is passed (sd_listen_fds(3)).
const firstListener = 3

// passed returns the number of sockets that systemd has passed to this process.
func passed() int {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return 0
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil {
		return 0
	}
	return max(0, n)
}

// KeepListeners lets the program that this process executes have the sockets that
// systemd has passed.
func KeepListeners() error {
	for fd := firstListener; fd < firstListener+passed(); fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("keep socket of systemd: %w", err)
		}
	}
	return nil
}

// Listener returns the socket that systemd has passed to this process, or nil. The socket
// stays systemd's: nothing removes its path. Listener is called once.
func Listener() (net.Listener, error) {
	if n := passed(); n > 1 {
		return nil, fmt.Errorf("systemd has passed %d sockets; want one", n)
	}
	files := activation.Files(true)
	if len(files) == 0 {
		return nil, nil
	}
	defer files[0].Close()
	l, err := net.FileListener(files[0])
	if err != nil {
		return nil, fmt.Errorf("listen on socket %s of systemd: %w", files[0].Name(), err)
	}
	return l, nil
}
