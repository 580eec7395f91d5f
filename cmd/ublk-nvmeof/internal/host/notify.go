package host

import (
	"fmt"
	"net"
	"os"
)

// Notify tells the service manager, if there is one that wants to know
// ($NOTIFY_SOCKET, sd_notify(3)): "READY=1", "STOPPING=1", "STATUS=…".
func Notify(state string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}
