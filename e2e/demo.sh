#!/bin/bash
# The whole thing once, on this machine as it is: a target in memory, RoCEv2 over UDP
# to it, and NBD clients in front; the ublk device too, where the machine has it. No
# RDMA device, no module is loaded, no root. Ends 0 only if every step did, and leaves
# nothing behind. Run it by "make demo".
#
#	e2e/demo.sh PROGRAM
set -euo pipefail

program=$(realpath "$1")
work=$(mktemp -d)
nqn=nqn.2026-01.org.example:demo
addr=127.0.0.1
port=$((20000 + $$ % 10000))
image=$work/image
step="start"

step() {
	step=$1
	printf '\n== %s\n' "$step"
}

# run prints a command before its output, as a reader would type it.
run() {
	printf '$ %s\n' "$*"
	"$@"
}

ublk-nvmeof() { "$program" "$@" --run-dir "$work/run"; }

clear_away() {
	status=$?
	[ $status = 0 ] || echo "demo: failed in step: $step" >&2
	# What is over already is no error.
	ublk-nvmeof disconnect -n $nqn --force >/dev/null 2>&1 || true
	ublk-nvmeof target stop >/dev/null 2>&1 || true
	rm -rf "$work"
	exit $status
}
trap clear_away EXIT

for tool in nbdinfo nbdcopy fio qemu-img; do
	command -v $tool >/dev/null || missing="${missing:-} $tool"
done
if [ -n "${missing:-}" ]; then
	echo "demo: not found:$missing (Debian: apt install libnbd-bin fio qemu-utils)" >&2
	exit 1
fi

step "A target: 256 MiB of memory, RoCEv2 over UDP"
run ublk-nvmeof target --background -a $addr -s $port -n $nqn --namespace ram=256MiB

step "Connect, with a socket for NBD clients in front"
run ublk-nvmeof connect -a $addr -s $port -n $nqn -i 2 -c 1 --provider roce --frontend nbd-socket
uri="nbd+unix:///1?socket=$(ls "$work"/run/nbd-*.sock)"
run ublk-nvmeof list -v | grep -E '^\$|state|end|provider|rdma|queues|nbd'

step "What a client sees"
run nbdinfo "$uri" | grep -E '^\$|protocol|size|can_(flush|fua|trim|zero|multi_conn)'

step "Write and read with four connections, and compare"
head -c $((64 << 20)) /dev/urandom >"$image"
run nbdcopy --connections=4 --flush "$image" "$uri"
run nbdcopy --connections=4 "$uri" "$image.back"
cmp -n $((64 << 20)) "$image" "$image.back"
echo "the same"

step "An image, by QEMU"
run qemu-img convert -f raw -O qcow2 "$uri" "$image.qcow2"
run qemu-img compare -f qcow2 -F raw "$image.qcow2" "$uri"

step "Random writes, read back and compared by checksum"
run fio --name=verify --ioengine=nbd --uri="$uri" --rw=randwrite --bsrange=4k-128k --iodepth=32 --size=64m \
	--verify=crc32c --verify_fatal=1 --verify_state_save=0 --output="$work/fio"
grep -E '^ +(read|write): IOPS' "$work/fio"
! grep -q 'err= *[1-9]' "$work/fio"

step "Speed (4 KiB at depth 32, 128 KiB at depth 8; this machine does both sides)"
for job in "4k 32" "128k 8"; do
	read -r bs depth <<<"$job"
	for rw in randread randwrite; do
		fio --name=$rw --ioengine=nbd --uri="$uri" --rw=$rw --bs="$bs" --iodepth="$depth" --size=256m \
			--time_based --runtime=2 --output="$work/fio"
		echo "$rw $bs: $(grep -oE 'IOPS=[^,]*, BW=[^ ]*' "$work/fio" | head -1)"
	done
done

step "A target that grants a single queue from now on, and drops the connection: I/O goes on"
run ublk-nvmeof target grant 1
run ublk-nvmeof target drop
run nbdcopy "$uri" "$image.back"
run ublk-nvmeof list
run ublk-nvmeof target grant 128
run ublk-nvmeof disconnect -n $nqn

if [ "$(id -u)" = 0 ] && [ -e /dev/ublk-control ]; then
	step "The ublk device, which this machine has"
	run ublk-nvmeof connect -a $addr -s $port -n $nqn -i 2 --provider roce --frontend ublk
	disk=$(ublk-nvmeof list | grep -oE '^/dev/ublkb[0-9]+')
	run fio --name=verify --ioengine=io_uring --direct=1 --filename="$disk" --rw=randwrite --bsrange=4k-128k \
		--iodepth=32 --size=64m --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output="$work/fio"
	grep -E '^ +(read|write): IOPS' "$work/fio"
	run ublk-nvmeof disconnect -n $nqn
fi

step "Nothing is left"
run ublk-nvmeof target stop
left=$(ls "$work/run") # its lock stays
if [ -n "$left" ]; then
	echo "left behind: $left" >&2
	exit 1
fi
echo "no server, no socket, no state"
