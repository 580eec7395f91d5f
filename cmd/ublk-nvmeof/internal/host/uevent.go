package host

import (
	"fmt"
	"os"
)

// Uevent has udev process the block device again that has this name, such as ublkb0. On a
// machine without udev it does nothing.
func Uevent(name string) error {
	if _, err := os.Stat("/run/udev/control"); err != nil {
		return nil
	}
	if err := os.WriteFile("/sys/class/block/"+name+"/uevent", []byte("change"), 0); err != nil {
		return fmt.Errorf("trigger an event of %s: %w", name, err)
	}
	return nil
}
