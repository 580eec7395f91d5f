#!/bin/bash
# The whole thing once, inside the VM: a real target, a block device served from
# userspace in front of it, a file system on that, and back. Ends 0 only if every
# step did, and leaves nothing behind. Run it by "make demo-vm".
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/build:$PATH
# shellcheck source=e2e/lab.sh
. "$root/e2e/lab.sh"

disk=/dev/ublkb0
work=$(mktemp -d)
mnt=$work/mnt
mkdir "$mnt"
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

trap 'status=$?; [ $status = 0 ] || echo "demo: failed in step: $step" >&2; exit $status' EXIT

connect() {
	run ublk-nvmeof connect -t rdma -a "$LAB_ADDR" -s "$LAB_PORT" -n "$LAB_NQN" -i 2 -W 1 -P 1
	[ -b $disk ]
}

step "A target: the kernel's nvmet-rdma over a software RDMA device"
run lab_target size=256 cache=16
rdma link

step "Connect: 2 queues for reads, 1 for the rest, 1 polled"
connect
run ublk-nvmeof list
run lsblk -o NAME,SIZE,LOG-SEC,RO,TYPE $disk

step "A file system, and a tree of files on it"
run mkfs.ext4 -q $disk
run mount $disk "$mnt"
tar -C "$root" --exclude=./build --exclude=./.git -cf - . | tar -C "$mnt" -xf -
(cd "$root" && find . -path ./build -prune -o -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/sums"
echo "copied $(wc -l <"$work/sums") files, $(du -sh "$mnt" | cut -f 1)"
run umount "$mnt"

step "Disconnect, and connect again"
run ublk-nvmeof disconnect -n "$LAB_NQN"
[ ! -e $disk ]
connect

step "The files are the same"
run fsck.ext4 -fn $disk
run mount -o ro $disk "$mnt"
(cd "$mnt" && sha256sum --check --quiet "$work/sums")
echo "all checksums match"
run umount "$mnt"

step "A short measurement (an emulated machine tells nothing about a real one)"
fio --output-format=normal --filename=$disk --direct=1 --ioengine=io_uring --time_based --runtime=3 \
	--name=read --rw=randread --bs=4k --iodepth=32 \
	--name=write --stonewall --rw=randwrite --bs=4k --iodepth=32 |
	grep -E '^ *(read|write) *: IOPS'

step "Disconnect: nothing is left"
run ublk-nvmeof disconnect -n "$LAB_NQN"
lab_clean
left=$(
	ls -d /dev/ublk[bc]* /run/ublk-nvmeof/* 2>/dev/null || true
	pgrep -x ublk-nvmeof || true
)
if [ -n "$left" ]; then
	echo "left behind: $left" >&2
	exit 1
fi
dmesg | grep -E 'BUG|WARNING|Oops|Call Trace' && exit 1
echo "no device, no process, no state file"
