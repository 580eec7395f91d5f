#!/bin/bash
# The target and a server with a socket for NBD clients, natively: no VM, no module, no
# RDMA device. This makes two network namespaces; e2e/soak does the rest.
#
#	e2e/soak-native.sh [-minutes N] [-only fault,…] [-paths N] [-seed N] [-program FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)

clear_away() {
	status=$?
	for end in soak-host soak-target; do
		ip netns pids $end 2>/dev/null | xargs -r kill -9 || true
		ip netns del $end 2>/dev/null || true
	done
	if [ $status = 0 ]; then
		rm -rf "$dir"
	else
		echo "soak-native: failed; all of it is in $dir" >&2
	fi
	exit $status
}
trap clear_away EXIT

for end in soak-host soak-target; do ip netns add $end; done
for end in soak-host soak-target; do ip -n $end link set lo up; done
build/soak -dir "$dir" "$@"
