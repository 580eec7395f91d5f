package state

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Controller names a controller of a subsystem: by its id and the address at which the target
// made it. Targets at several addresses can be separate processes that give the same ids.
type Controller struct {
	Address netip.AddrPort // zero: unknown, in records of older versions
	CNTLID  uint16
}

// String returns ID@ADDRESS, or ID if the address is unknown.
func (c Controller) String() string {
	id := strconv.Itoa(int(c.CNTLID))
	if !c.Address.IsValid() {
		return id
	}
	return id + "@" + c.Address.String()
}

// MarshalText returns the name.
func (c Controller) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText parses a name.
func (c *Controller) UnmarshalText(text []byte) error {
	digits, address, located := strings.Cut(string(text), "@")
	id, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return fmt.Errorf("controller %q: want ID@ADDRESS, with an id of at most 65535", text)
	}
	*c = Controller{CNTLID: uint16(id)}
	if located {
		if c.Address, err = netip.ParseAddrPort(address); err != nil {
			return fmt.Errorf("controller %q: %w", text, err)
		}
	}
	return nil
}

// UnmarshalJSON parses a name, or the number that older versions wrote.
func (c *Controller) UnmarshalJSON(text []byte) error {
	var name string
	if json.Unmarshal(text, &name) == nil {
		return c.UnmarshalText([]byte(name))
	}
	*c = Controller{}
	return json.Unmarshal(text, &c.CNTLID)
}

// Distinct returns controllers with only the last occurrence of each.
func Distinct(all []Controller) []Controller {
	var out []Controller
	for i, c := range all {
		if !slices.Contains(all[i+1:], c) {
			out = append(out, c)
		}
	}
	return out
}
