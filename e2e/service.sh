#!/bin/bash
# Runs beside systemd, on the machine that e2e/service-before.sh has prepared. UN_SERVICE
# says what is tested: "install" installs the package and configures connections on a machine
# that runs, "boot" is from the next boot of that machine over a death of a server to a shutdown
# with I/O, and "life" is all else that happens to a service and to the package.
set -uo pipefail

cd "$(dirname "$0")/.."
. e2e/service-lab.sh

step() { echo "=== $(cut -d' ' -f1 /proc/uptime) $*"; }

failures=0
# fail notes a failure. The steps after it are run all the same.
fail() {
	failures=$((failures + 1))
	echo "FAIL: $*"
	systemctl --no-pager -n 0 status ublk-nvmeof@disk.service
	journalctl --no-pager -n 15 -u ublk-nvmeof@disk.service -u '*.mount'
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

# until_true SECONDS COMMAND… repeats a command until it succeeds.
until_true() {
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || { fail "not in time: $*"; return 0; }
		sleep 0.2
	done
}
property() { systemctl show -P "$2" "ublk-nvmeof@$1.service"; }
active() { [ "$(systemctl is-active "$1")" = active ]; }
inactive() { [ "$(systemctl is-active "$1")" = inactive ]; }
is_main() { [ "$(property disk MainPID)" = "$1" ]; }
isnt_main() { [ "$(property disk MainPID)" != "$1" ] && active ublk-nvmeof@disk.service; }
# since_boot UNIT PROPERTY prints a time of a unit in seconds.
since_boot() { systemctl show -P "$2" "$1" | awk '{ printf "%.1f", $1 / 1e6 }'; }
# load UNIT DIRECTORY SECONDS verifies data in a file system, as a service.
load() {
	systemd-run --quiet --unit="$1" -p "RequiresMountsFor=$2" -p RemainAfterExit=yes fio --name=v --directory="$2" \
		--size=16M --bs=4k-64k --rw=randrw --ioengine=libaio --direct=1 --iodepth=8 \
		--verify=crc32c --time_based --runtime="$3" --do_verify=1
}
verified() { [ "$(systemctl show -P SubState "$1")" = exited ]; }

booted() {
	step boot
	until_true 120 test -S /run/systemd/private
	until_true 240 active multi-user.target
}

boot() {
	booted
	local dir unit
	for dir in uuid id b c d e; do until_true 60 mountpoint -q /mnt/$dir; done

	step "file systems of fstab: by UUID, id, path and label"
	echo "network-online $(since_boot network-online.target ActiveEnterTimestampMonotonic), sysinit $(since_boot sysinit.target ActiveEnterTimestampMonotonic)," \
		"multi-user $(since_boot multi-user.target ActiveEnterTimestampMonotonic)"
	for unit in ublk-nvmeof@{disk,b,c,d}.service ublk-nvmeof-discovery.service dev-ublkb{0,1,2,3,4,5}.device mnt-{uuid,id,b,c,d,e}.mount; do
		echo "$unit: $(since_boot $unit InactiveExitTimestampMonotonic) to $(since_boot $unit ActiveEnterTimestampMonotonic) s"
	done
	systemd-analyze --no-pager critical-chain remote-fs.target || true
	systemctl --failed --no-legend
	[ -z "$(systemctl --failed --no-legend)" ] || fail "units failed"
	[ "$(find /dev/disk/by-id -lname '*ublkb0' | wc -l)" -ge 2 ] || fail "too few names in by-id"
	for link in by-uuid/11111111-2222-3333-4444-555555555555 by-label/lab-d by-path/nvmeof-$base:disk-ns-{1,2}; do
		[ -b "/dev/disk/$link" ] || fail "no $link"
	done
	# Copies of mounts in another name space would keep the devices busy.
	[ "$(readlink "/proc/$(property disk MainPID)/ns/mnt")" = "$(readlink /proc/self/ns/mnt)" ]
}

# again checks that this is another boot of the machine on which the package was installed.
again() {
	step "a second boot"
	[ "$(cat /var/lib/installed)" != "$(cat /proc/sys/kernel/random/boot_id)" ]
	[ "$(cat /mnt/uuid/installed)" = "$(cat /var/lib/installed)" ] || fail "the disk is another one"
}

discovered() {
	step "a subsystem that a discovery service lists later"
	local port
	[ "$(systemctl is-active ublk-nvmeof-discovery.service)" = active ]
	[[ $(systemctl show -P StatusText ublk-nvmeof-discovery.service) == "connected to discovery services" ]] || fail "the status of the unit"
	port=$(lab_ports $base:e)
	lab_target nqn=$base:later svc=4429 size=64
	ln -s "/sys/kernel/config/nvmet/subsystems/$base:later" "$port/subsystems/"
	until_true 60 test -b "/dev/disk/by-path/nvmeof-$base:later-ns-1"
	systemctl stop ublk-nvmeof-discovery.service
	mountpoint -q /mnt/e
	dd if="/dev/disk/by-path/nvmeof-$base:later-ns-1" of=/dev/null bs=4096 count=1 iflag=direct status=none
	systemctl start ublk-nvmeof-discovery.service
	ublk-nvmeof disconnect -n $base:later # the service does not connect it again
	lab_target_down $base:later
}

killed() {
	step "the server is killed under fio"
	local pid
	pid=$(property disk MainPID)
	load verify /mnt/uuid 8
	sleep 3
	kill -9 "$pid"
	until_true 60 isnt_main "$pid"
	until_true 120 verified verify
	mountpoint -q /mnt/uuid
	[ "$(property disk NRestarts)" = 1 ] || fail "restarted $(property disk NRestarts) times, want once"
}

reload() {
	step "SIGHUP and reload"
	local pid
	pid=$(property disk MainPID)
	systemctl reload ublk-nvmeof@disk.service
	kill -HUP "$pid"
	active ublk-nvmeof@disk.service
	is_main "$pid"
}

state() {
	step "state, watchdog and journal"
	[[ $(property disk StatusText) == "live: $base:disk"* ]] || fail "status $(property disk StatusText)"
	watched=$(property disk WatchdogTimestampMonotonic)
	watchdog_fed() { [ "$(property disk WatchdogTimestampMonotonic)" != "$watched" ]; }
	until_true 60 watchdog_fed
	journalctl -q PRIORITY=6 NVMEOF_FRONTEND=ublk | grep -q "front end chosen"
}

upgrade() {
	step "the package is upgraded, and then the server, under fio"
	local pid
	pid=$(property disk MainPID)
	load verify-upgrade /mnt/uuid 60
	dpkg -i build/newer/ublk-nvmeof_*.deb
	is_main "$pid"
	ublk-nvmeof upgrade $base:disk
	until_true 30 isnt_main "$pid"
	pid=$(property disk MainPID)
	[ "$(readlink "/proc/$pid/exe")" = /usr/bin/ublk-nvmeof ] || fail "the server still runs the old program"
	grep -q 'ublk-nvmeof@disk.service$' "/proc/$pid/cgroup"
	until_true 120 verified verify-upgrade
	[[ $(property disk StatusText) == "live: $base:disk"* ]] || fail "status $(property disk StatusText)"
	step "the new main process is killed"
	kill -9 "$pid"
	until_true 60 isnt_main "$pid"
	echo "after the upgrade" >/mnt/uuid/after && sync -f /mnt/uuid/after
}

stop_waits() {
	step "a stop waits for users"
	local pid
	pid=$(property disk MainPID)
	mkdir -p /run/systemd/system/ublk-nvmeof@disk.service.d
	printf '[Service]\nTimeoutStopSec=6\n' >/run/systemd/system/ublk-nvmeof@disk.service.d/stop.conf
	systemctl daemon-reload
	echo hello >/mnt/uuid/file
	umount /mnt/uuid
	systemctl stop ublk-nvmeof@disk.service || true
	kill -0 "$pid"
	echo "still served" >/mnt/id/file && sync -f /mnt/id/file
	umount /mnt/id
	gone() { ! kill -0 "$pid"; }
	until_true 30 gone
	rm -r /run/systemd/system/ublk-nvmeof@disk.service.d
	systemctl daemon-reload
	systemctl start ublk-nvmeof@disk.service
	# systemd unmounts what it finds mounted before it has seen the device.
	systemctl start mnt-uuid.mount mnt-id.mount
	[ "$(cat /mnt/uuid/file)" = hello ]
	[ "$(cat /mnt/id/file)" = "still served" ]
}

late() {
	step "a target that comes after the boot"
	if active ublk-nvmeof@late.service; then fail "it is active without a target"; fi
	lab_target nqn=$base:late svc=4430 size=64
	mkfs.ext4 -q "$(cat /sys/kernel/config/nvmet/subsystems/$base:late/namespaces/1/device_path)"
	until_true 60 active ublk-nvmeof@late.service
	until_true 60 mountpoint -q /mnt/late
}

socket() {
	step "the first client of a socket starts its service"
	lab_target nqn=$base:nbd svc=4426 size=64
	connection nbd 4426
	echo "frontend = nbd-socket" >>/etc/ublk-nvmeof/nbd.conf
	cp /usr/share/doc/ublk-nvmeof/examples/ublk-nvmeof-nbd@.socket /run/systemd/system/ublk-nvmeof@.socket
	systemctl daemon-reload
	systemctl start ublk-nvmeof@nbd.socket
	if active ublk-nvmeof@nbd.service; then fail "it is active without a client"; fi
	[ "$(nbdinfo --size "nbd+unix:///1?socket=/run/ublk-nvmeof-nbd.sock")" = $((64 << 20)) ]
	active ublk-nvmeof@nbd.service
	systemctl stop ublk-nvmeof@nbd.socket ublk-nvmeof@nbd.service
	rm /run/systemd/system/ublk-nvmeof@.socket
	systemctl daemon-reload
}

scopes() { systemctl list-units --no-legend --plain 'ublk-nvmeof-*.scope' | cut -d' ' -f1 | sort; }

by_hand() {
	step "a server that was started by hand outlives its session"
	local scope others
	others=$(scopes) # of what was discovered
	lab_target nqn=$base:hand svc=4425 size=64
	systemd-run --quiet --unit=session-test -p Type=oneshot --wait \
		ublk-nvmeof connect -a $LAB_ADDR -s 4425 -n $base:hand --nr-io-queues=1
	systemctl stop session-test.service 2>/dev/null || true
	scope=$(comm -13 <(echo "$others") <(scopes))
	[ -n "$scope" ] || fail "no scope"
	ublk-nvmeof list | grep -q $base:hand
	systemctl kill -s HUP "$scope"
	ublk-nvmeof list | grep -q $base:hand
	systemctl stop "$scope"
	if ublk-nvmeof list | grep -q $base:hand; then fail "the scope has not ended"; fi
}

removal() {
	step "the package is not removed while servers run"
	if dpkg -r ublk-nvmeof; then fail "removed"; fi
	active ublk-nvmeof@disk.service
	step "the package is purged"
	umount /mnt/{uuid,id,b,c,d,e,late}
	ublk-nvmeof disconnect -n $base:e
	systemctl stop ublk-nvmeof.target
	until_true 30 inactive ublk-nvmeof@disk.service
	dpkg -L ublk-nvmeof | sort >/tmp/files
	dpkg -P ublk-nvmeof
	local left
	left=$(while read -r f; do [ ! -e "$f" ] || [ -d "$f" ] || echo "$f"; done </tmp/files
		find /etc /var/lib /run /usr/share/doc /dev/disk -xdev -name '*ublk*nvmeof*' ! -path '/var/lib/systemd/*')
	[ -z "$left" ] || fail "the package leaves $left"
	systemctl --failed --no-legend
}

case $UN_SERVICE in
install)
	booted
	step "the package is installed and configured"
	install
	mount "$(backing disk 1)" /mnt/uuid
	cat /proc/sys/kernel/random/boot_id >/mnt/uuid/installed
	umount /mnt/uuid
	cp /proc/sys/kernel/random/boot_id /var/lib/installed
	;;
boot)
	boot
	again
	discovered
	killed
	reload
	step "I/O, and a target that is gone, at the shutdown"
	load busy /mnt/b 600
	dd if=/dev/urandom of=/mnt/c/last bs=1M count=8 status=none
	dd if=/dev/urandom of=/mnt/d/last bs=1M count=1 status=none
	lab_target_down $base:d
	;;
life)
	boot
	state
	upgrade
	stop_waits
	late
	socket
	by_hand
	removal
	;;
esac
step shutdown | tee /dev/console
exit $((failures > 0))
