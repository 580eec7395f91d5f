package identity_test

import (
	"fmt"
	"io/fs"

	"ublk-nvmeof/identity"
)

// A host with a name in /etc/nvme is known by it.
func ExampleFind() {
	host, err := identity.Find("", "", identity.Sources{
		LookupEnv: func(string) (string, bool) { return "", false },
		ReadFile: func(name string) ([]byte, error) {
			if name == "/etc/nvme/hostnqn" {
				return []byte("nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555\n"), nil
			}
			return nil, fs.ErrNotExist
		},
	})
	fmt.Println(host.NQN, host.ID, err)
	// Output: nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555 11111111-2222-3333-4444-555555555555 <nil>
}
