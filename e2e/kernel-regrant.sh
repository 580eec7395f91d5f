#!/bin/bash
# For comparison, in the VM: the kernel's own initiator goes through what the scenario
# regrant puts ours through, and says how far it came. Its oopses are what this
# program exists for; no test waits for them.
#
#	build/vm --kernel 7.3 -- e2e/kernel-regrant.sh [I W P]
set -uo pipefail
. e2e/lab.sh
i=${1:-2} w=${2:-2} p=${3:-2}
lab_rxe 4200 && lab_target size=64 && lab_grant 5 && modprobe nvme-rdma || exit
nvme connect -t rdma -a $LAB_ADDR -s $LAB_PORT -n $LAB_NQN -i "$i" -W "$w" -P "$p" -c 1 -l 60 || exit
sleep 1
cd "$(mktemp -d)" || exit
fio --name=load --filename=/dev/nvme0n1 --direct=1 --ioengine=io_uring --rw=randrw --bsrange=512-64k --iodepth=8 \
	--time_based --runtime=600 >fio.out 2>&1 &
sleep 2
state() { cat /sys/class/nvme/nvme0/state; }
done_io() { awk '{ print $1 + $5 }' /sys/block/nvme0n1/stat; }
for grant in 3 8 1 4 2 6; do
	lab_grant $grant
	for _ in $(seq 200); do
		sleep 0.1
		! dmesg | grep -qE 'BUG|Oops' || break 2
		[ "$(state)" != live ] || break
	done
	before=$(done_io)
	sleep 2
	echo "$i/$w/$p, grant $grant: state $(state), $(cat /sys/class/nvme/nvme0/queue_count) queues, $(($(done_io) - before)) I/Os in 2 s"
done
if dmesg | grep -qE 'BUG|Oops'; then
	echo "$i/$w/$p, grant $grant: the kernel oopses"
	dmesg | grep -E 'BUG|Oops|RIP:' | head -n 3
	before=$(done_io)
	sleep 10
	echo "state $(state), $(($(done_io) - before)) I/Os in the 10 s after it"
	nvme disconnect -n $LAB_NQN >disconnect.out 2>&1 &
	sleep 10
	echo "nvme disconnect after 10 s: $(ps -o stat= -p $! || echo ended)"
fi
