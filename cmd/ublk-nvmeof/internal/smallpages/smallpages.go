//go:build linux && cgo

package smallpages

import "C"
