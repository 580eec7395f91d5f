#!/bin/bash
# connect-time.sh [ROUNDS]: how long nvme connect and ublk-nvmeof connect take until a block of
# the new device has been read, in turns, with the same queues. It runs in the VM:
#
#	build/vm --kernel 7.3 --mtu 4200 -- e2e/connect-time.sh
#
# For each number of queues, the third line has the medians. With --icount --env UN_ICOUNT=1 the times
# are those of the instructions.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/build:$PATH
. e2e/lab.sh
rounds=${1:-9}
lab_target
modprobe -a nvme-rdma ublk_drv

# The root file system of the VM is the host's: each file that is opened takes a round trip, however
# much of it is cached. So what the programs open is copied into the layer in memory.
for program in nvme ublk-nvmeof dd perl; do
	which "$program"
	ldd "$(which "$program")" | grep -o '/[^ )]*'
done | sort -u | xargs -n 1 realpath | xargs touch -c
touch -c /etc/ld.so.cache /etc/nvme/* /etc/libibverbs.d/* "$(dirname "$(ldconfig -p | sed -n 's/.*libibverbs.so.1 .* => //p')")"/libibverbs/*

if [ -n "${UN_ICOUNT:-}" ]; then # without a timer, a clock of instructions leaps when all CPUs wait for the host
	perl -e 'select(undef, undef, undef, 1e-4) while 1' &
	trap "kill $!" EXIT
fi

now() { echo $(($(date +%s%N) / 1000000)); }
block() { until dd if="$1" of=/dev/null bs=4096 count=1 iflag=direct status=none 2>/dev/null; do :; done; }
median() { printf '%s\n' "$@" | sort -n | sed -n "$(((rounds + 1) / 2))p"; }

for queues in 1 4; do
	with=(-t rdma -a "$LAB_ADDR" -s "$LAB_PORT" -n "$LAB_NQN" -i "$queues")
	kernel=() ours=()
	for ((i = 0; i < rounds; i++)); do
		t=$(now)
		nvme connect "${with[@]}" >/dev/null
		block /dev/nvme0n1
		kernel+=($(($(now) - t)))
		nvme disconnect -n "$LAB_NQN" >/dev/null
		t=$(now)
		ublk-nvmeof connect "${with[@]}" --device-id 0 >/dev/null
		block /dev/ublkb0
		ours+=($(($(now) - t)))
		ublk-nvmeof disconnect -n "$LAB_NQN" >/dev/null
	done
	echo "nvme connect, ms:        ${kernel[*]}"
	echo "ublk-nvmeof connect, ms: ${ours[*]}"
	echo "$queues queues, medians of $rounds: nvme connect $(median "${kernel[@]}") ms, ublk-nvmeof connect $(median "${ours[@]}") ms"
done
lab_clean
