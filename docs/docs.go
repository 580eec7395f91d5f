// Package docs has those documents that the program reads itself.
package docs

import _ "embed"

// KernelBugs is kernel-bugs.md. The command doctor reads its table of releases.
//
//go:embed kernel-bugs.md
var KernelBugs string
