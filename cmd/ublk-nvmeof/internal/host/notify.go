package host

import (
	"fmt"
	"net"
	"os"
	"strings"
)

// Notify sends assignments to the service manager, as sd_notify(3) does: "READY=1",
// "STOPPING=1", "STATUS=…". A newline in an assignment becomes a space. Without
// $NOTIFY_SOCKET there is nothing to do.
func Notify(assignments ...string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer c.Close()
	var lines []string
	for _, a := range assignments {
		lines = append(lines, strings.ReplaceAll(a, "\n", " "))
	}
	if _, err := c.Write([]byte(strings.Join(lines, "\n"))); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}
