#!/bin/bash
# The target's whole machine stands still for a while: two VMs with a cable between
# them, of which one is stopped. I/O waits and goes on; disconnect does not wait.
#
#	e2e/frozen.sh KERNEL [SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."
kernel=$1 seconds=${2:-40}
dir=$(mktemp -d)
cable=$dir/cable
trap 'jobs -p | xargs -r kill -9; rm -rf "$dir"' EXIT
mkfifo "$dir/target" "$dir/host"

build/vm --kernel "$kernel" --cpus 2 --cable "$cable" -- \
	bash -c '. e2e/lab.sh; lab_far 10.0.3.2 && lab_target addr=10.0.3.2 size=64 && echo ready && sleep 600' >"$dir/target" &
exec 3<"$dir/target"
read -r line <&3
[ "$line" = ready ]
qemu=$(pgrep -f "server=on.*$cable")

build/vm --kernel "$kernel" --cpus 2 --cable "$cable" -- e2e/frozen-host.sh >"$dir/host" &
host=$!
exec 4<"$dir/host"
while read -r line <&4; do
	echo "$line"
	case $line in
	freeze) kill -STOP "$qemu"; sleep "$seconds"; kill -CONT "$qemu"; echo thawed ;;
	stop) kill -STOP "$qemu" ;;
	esac
done
wait "$host"
