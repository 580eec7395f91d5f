//go:build linux && cgo && !noverbs

package prepare

import "C"
