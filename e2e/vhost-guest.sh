#!/bin/sh
# The guest of e2e/vhost.sh: one step, by name, and two times in seconds.
set -eu
for module in virtio_blk ext4 xfs; do modprobe $module; done
for _ in $(seq 100); do [ -b /dev/vda ] && break; sleep 0.1; done
disk=/sys/block/vda
mkdir -p /mnt/disk

# verify writes and reads, four jobs, each with an area of its own, so that all queues are
# in use.
verify() {
	fio --name=verify --filename="$1" --size=24M --offset_increment=24M --numjobs=4 --ioengine=libaio --direct=1 --iodepth=16 \
		--rw=randrw --bsrange=4k-64k --verify=crc32c --verify_fatal=1 --verify_backlog=64 --group_reporting ${2:-} >/tmp/fio 2>&1 || {
		cat /tmp/fio; dmesg | tail -n 20; exit 1; }
	grep -E 'IOPS=|clat.*max=|err=' /tmp/fio
}

# clean fails if the kernel has seen an error of the disk.
clean() {
	! dmesg | grep -iE 'vda.*error|I/O error|blocked for more' || exit 1
}

case $1 in
first)
	if ! blkid /dev/vda | grep -q ext4; then
		[ "$(ls $disk/mq | wc -l)" = 4 ]
		echo "disk of $(($(cat $disk/size) / 2048)) MiB, serial $(cat $disk/serial), cache $(cat $disk/queue/write_cache), discard up to $(cat $disk/queue/discard_max_bytes)"
		mkfs.ext4 -q /dev/vda
		mount -o discard /dev/vda /mnt/disk
		verify /mnt/disk/fio
		cp -r /usr/share/doc/a* /mnt/disk
		(cd /mnt/disk && find a* -type f -exec md5sum {} + >sums)
		sync
		echo "reboots"
		echo b >/proc/sysrq-trigger
		sleep 60
		exit 1
	fi
	mount -o discard /dev/vda /mnt/disk
	(cd /mnt/disk && md5sum --quiet -c sums)
	rm -rf /mnt/disk/a*
	fstrim -v /mnt/disk
	umount /mnt/disk
	fsck.ext4 -fn /dev/vda
	echo "want 768 MiB"
	for _ in $(seq 300); do [ "$(cat $disk/size)" = $((768 * 2048)) ] && break; sleep 0.1; done
	[ "$(cat $disk/size)" = $((768 * 2048)) ]
	echo "resized"
	mkfs.xfs -q -f /dev/vda
	mount /dev/vda /mnt/disk
	verify /mnt/disk/fio
	cp -r /usr/share/doc/b* /mnt/disk
	umount /mnt/disk
	xfs_repair -n /dev/vda >/dev/null 2>&1
	;;
load)
	echo "upgrades begin"
	verify /dev/vda "--time_based --runtime=$2"
	echo "kills begin"
	verify /dev/vda "--time_based --runtime=$3"
	;;
kills)
	echo "kills begin"
	verify /dev/vda "--time_based --runtime=$3"
	;;
again)
	verify /dev/vda
	;;
esac
clean
