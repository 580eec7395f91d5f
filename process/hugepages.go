package process

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// exceptAdvised is PR_THP_DISABLE_EXCEPT_ADVISED, since Linux 6.18: memory for which the
// process has asked for huge pages still gets them.
const exceptAdvised = 2

// UseSmallPages keeps transparent huge pages from memory for which this process has not asked for
// them. Programs that it executes inherit that. A process that starts touches little of its heap,
// and a huge page takes hundreds of times as long to be zeroed as a small one. It is an error
// before Linux 6.18.
func UseSmallPages() error {
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, exceptAdvised, 0, 0); err != nil {
		return fmt.Errorf("turn transparent huge pages off: %w", err)
	}
	return nil
}

// UseHugePages undoes UseSmallPages, for a process that has started.
func UseHugePages() error {
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("turn transparent huge pages on: %w", err)
	}
	return nil
}
