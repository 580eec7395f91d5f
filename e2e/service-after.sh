#!/bin/bash
# Looks at the console of the machine of e2e/service.sh: file systems were unmounted before
# their server was stopped, and nothing was left.
set -euo pipefail

log=$1
down=$(sed -n '/=== shutdown/,$p;/systemd-shutdown\|Reached target.*reboot.target/p' "$log")
line() { grep -n -- "$1" "$log" | tail -n 1 | cut -d: -f1; }
unmounted=$(line 'Unmounted .*mnt-uuid.mount\|mnt-uuid.mount: Deactivated')
stopped=$(line 'Stopped .*ublk-nvmeof@disk\|ublk-nvmeof@disk.service: Deactivated')
[ -n "$unmounted" ] && [ -n "$stopped" ] && [ "$unmounted" -lt "$stopped" ] ||
	{ echo "service-after: unmounted in line ${unmounted:-?}, stopped in line ${stopped:-?} of $log" >&2; exit 1; }
! grep -E 'Failed to unmount|Failed unmounting|I/O error|EXT4-fs error|ublk-nvmeof@disk.service: (State .* timed out|Failed)' <<<"$down" ||
	{ echo "service-after: the shutdown was not clean; see $log" >&2; exit 1; }
