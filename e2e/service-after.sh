#!/bin/bash
# Looks at the console of the machine of e2e/service.sh: file systems were unmounted before
# their servers were stopped, what targets have is clean, and nothing hung. systemd waits for
# 90 s for what hangs. Without a hang, a shutdown takes 3 s to 20 s of an emulated machine.
set -euo pipefail

log=$1 limit=60
bad() {
	echo "service-after: $*; see $log" >&2
	exit 1
}
line() { grep -an -- "$1" "$log" | tail -n 1 | cut -d: -f1; }
began=$(sed -n 's/.*=== \([0-9]*\)[0-9.]* shutdown.*/\1/p' "$log" | tail -n 1)
ended=$(sed -n 's/.*=== \([0-9]*\)[0-9.]* unmounted.*/\1/p' "$log" | tail -n 1)
[ -n "$began" ] && [ -n "$ended" ] || bad "no times of the shutdown"
echo "the shutdown took $((ended - began)) s"
[ $((ended - began)) -le $limit ] || bad "want at most $limit s"
[ "$(grep -ac '=== fsck of .*: 0' "$log")" = 4 ] || bad "not all of four file systems are clean"
if [ "$UN_SERVICE" = boot ]; then
	unmounted=$(line 'mnt-uuid.mount: Deactivated') stopped=$(line 'ublk-nvmeof@disk.service: Deactivated')
	[ -n "$unmounted" ] && [ -n "$stopped" ] && [ "$unmounted" -lt "$stopped" ] ||
		bad "unmounted in line ${unmounted:-?}, stopped in line ${stopped:-?}"
fi
