#!/bin/bash
# Compares what a guest of QEMU gets from three disks, without KVM and on this machine, in rounds
# that take turns. Each disk is in memory behind two hops:
#
#	vhost	our vhost-user-blk, initiator, RoCEv2 in Go over loopback, our target
#	nbd	our NBD socket for QEMU's NBD client, and then the same
#	qsd	the vhost-user-blk export of qemu-storage-daemon, NBD over TCP, qemu-nbd
#
#	bench/vhost.sh PROGRAM VM [KERNEL [ROUNDS [SECONDS]]]
#
# It prints the medians of IOPS, and the median, least and largest ratio of the same round.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "$1") vm=$(realpath "$2") kernel=${3:-6.12} rounds=${4:-7} seconds=${5:-3}
work=$(mktemp -d) memory=$(mktemp -d -p /dev/shm)
nqn=nqn.2026-01.org.example:bench
addr=127.$((2 + $$ % 250)).$((RANDOM % 250)).2 # nobody else's
port=$((20000 + $$ % 10000))
pids=
un() { "$program" "$@"; }

clear_away() {
	status=$?
	for d in vhost nbd; do un disconnect -n $nqn --force --run-dir "$work/$d" >/dev/null 2>&1 || true; done
	un target stop --run-dir "$work/target" >/dev/null 2>&1 || true
	for p in $pids; do kill "$p" 2>/dev/null || true; done
	rm -rf "$work" "$memory"
	exit $status
}
trap clear_away EXIT

un target --background --run-dir "$work/target" -a $addr -s $port -n $nqn --namespace ram=256MiB >/dev/null
args=(-a $addr -s $port -n $nqn --provider roce -i 2)
un connect "${args[@]}" --run-dir "$work/vhost" --namespace 1 --vhost-socket "$work/vhost.sock" >/dev/null
un connect "${args[@]}" --run-dir "$work/nbd" -q $nqn:nbd --nbd-socket "$work/nbd.sock" >/dev/null
truncate -s 256M "$memory/disk"
dd if=/dev/zero of="$memory/disk" bs=1M count=256 conv=notrunc status=none
qemu-nbd -t -f raw -b $addr -p $port -x 1 -e 4 --cache=writeback "$memory/disk" &
pids+=" $!"
for _ in $(seq 100); do ! qemu-img info "nbd://$addr:$port/1" >/dev/null 2>&1 || break; sleep 0.1; done
qemu-storage-daemon --blockdev "driver=nbd,node-name=disk,server.type=inet,server.host=$addr,server.port=$port,export=1" \
	--export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$work/qsd.sock,writable=on,num-queues=2" &
pids+=" $!"
for _ in $(seq 100); do [ ! -S "$work/qsd.sock" ] || break; sleep 0.1; done

"$vm" --kernel "$kernel" --cpus 2 --mem 1G --parallel --timeout 20m \
	--vhost-user-blk "$work/vhost.sock" --vhost-user-blk "$work/qsd.sock" --nbd "$work/nbd.sock" -- sh -euc '
modprobe virtio_blk
for _ in $(seq 100); do [ -b /dev/vdc ] && break; sleep 0.1; done
for round in $(seq '"$rounds"'); do
	for load in "randread 4k 32" "randwrite 4k 32" "read 128k 8" "write 128k 8"; do
		set -- $load
		for disk in vhost:vda qsd:vdb nbd:vdc; do
			iops=$(fio --name=x --filename=/dev/${disk#*:} --rw=$1 --bs=$2 --iodepth=$3 --ioengine=libaio --direct=1 --size=256m \
				--time_based --ramp_time=0.5 --runtime='"$seconds"' --minimal | cut -d";" -f8,49) # of reads, of writes
			echo "$round $1-$2-qd$3 ${disk%:*} $((${iops%;*} + ${iops#*;}))"
		done
	done
done' | tee "$work/figures"

awk '
function sort(v, n, i, j, x) { for (i = 2; i <= n; i++) { x = v[i]; for (j = i - 1; j > 0 && v[j] > x; j--) v[j+1] = v[j]; v[j+1] = x } }
function spread(of, load, to, v, n, r) {
	for (r = 1; r <= rounds; r++) v[++n] = to == "" ? iops[r, load, of] : iops[r, load, of] / iops[r, load, to]
	sort(v, n)
	return to == "" ? sprintf("%d", v[int((n+1)/2)]) : sprintf("%.2f (%.2f to %.2f)", v[int((n+1)/2)], v[1], v[n])
}
NF == 4 { iops[$1, $2, $3] = $4; if ($1 > rounds) rounds = $1; if (!seen[$2]++) loads[++count] = $2 }
END {
	print "| | vhost | nbd | qsd | vhost / nbd | vhost / qsd |"
	print "|---|---:|---:|---:|---:|---:|"
	for (i = 1; i <= count; i++) {
		l = loads[i]
		printf "| %s | %s | %s | %s | %s | %s |\n", l, spread("vhost", l, ""), spread("nbd", l, ""), spread("qsd", l, ""), spread("vhost", l, "nbd"), spread("vhost", l, "qsd")
	}
}' "$work/figures"
