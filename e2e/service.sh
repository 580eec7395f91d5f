#!/bin/bash
# Runs beside systemd, on the machine that e2e/service-before.sh has prepared: the
# connection as a service, from the boot to the shutdown.
set -uo pipefail

cd "$(dirname "$0")/.."
. e2e/lab.sh
late=nqn.2026-01.org.example:late

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
is_main() { [ "$(property disk MainPID)" = "$1" ]; }
isnt_main() { [ "$(property disk MainPID)" != "$1" ] && active ublk-nvmeof@disk.service; }

step boot
until_true 120 test -S /run/systemd/private
until_true 240 active multi-user.target

step "file systems of fstab, by UUID and by id"
until_true 60 mountpoint -q /mnt/uuid
until_true 60 mountpoint -q /mnt/id
active ublk-nvmeof@disk.service
for link in by-uuid/11111111-2222-3333-4444-555555555555 by-label/lab-disk by-path/nvmeof-$LAB_NQN-ns-1 by-path/nvmeof-$LAB_NQN-ns-2; do
	[ -b "/dev/disk/$link" ] || fail "no $link"
done
find /dev/disk -lname '*ublkb*' | sort
[ "$(find /dev/disk/by-id -lname '*ublkb0' | wc -l)" -ge 2 ] || fail "too few names in by-id"
echo hello >/mnt/uuid/file

step "state, watchdog and journal"
[[ $(property disk StatusText) == "live: $LAB_NQN"* ]] || fail "status $(property disk StatusText)"
watched=$(property disk WatchdogTimestampMonotonic)
watchdog_fed() { [ "$(property disk WatchdogTimestampMonotonic)" != "$watched" ]; }
until_true 60 watchdog_fed
journalctl -q PRIORITY=6 NVMEOF_FRONTEND=ublk | grep -q "front end chosen"

step "the server is killed under fio"
pid=$(property disk MainPID)
fio --name=v --directory=/mnt/uuid --size=16M --bs=4k-64k --rw=randrw --ioengine=libaio --direct=1 --iodepth=8 \
	--verify=crc32c --time_based --runtime=60 --do_verify=1 >/tmp/fio 2>&1 &
fio=$!
sleep 5
kill -9 "$pid"
until_true 60 isnt_main "$pid"

step "reload"
pid=$(property disk MainPID)
systemctl reload ublk-nvmeof@disk.service
kill -HUP "$pid"
active ublk-nvmeof@disk.service
is_main "$pid"

step "the package is upgraded, and then the server"
dpkg -i build/newer/new.deb
is_main "$pid"
ublk-nvmeof upgrade "$LAB_NQN"
until_true 30 isnt_main "$pid"
pid=$(property disk MainPID)
[ "$(readlink "/proc/$pid/exe")" = /usr/bin/ublk-nvmeof ] || fail "the server still runs the old program"
grep -q 'ublk-nvmeof@disk.service$' "/proc/$pid/cgroup"
wait $fio || { cat /tmp/fio; fail "fio"; }
grep -q 'err= 0' /tmp/fio || { cat /tmp/fio; fail "fio"; }
[[ $(property disk StatusText) == "live: $LAB_NQN"* ]] || fail "status $(property disk StatusText)"
[ "$(property disk NRestarts)" = 1 ] || fail "restarted $(property disk NRestarts) times, want once"

step "a stop waits for users"
mkdir -p /run/systemd/system/ublk-nvmeof@disk.service.d
printf '[Service]\nTimeoutStopSec=6\n' >/run/systemd/system/ublk-nvmeof@disk.service.d/stop.conf
systemctl daemon-reload
umount /mnt/uuid # it requires the service, and would be unmounted
systemctl stop ublk-nvmeof@disk.service || true
kill -0 "$pid"
echo "still served" >/mnt/id/file && sync -f /mnt/id/file
umount /mnt/id
gone() { ! kill -0 "$pid"; }
until_true 30 gone
systemctl start ublk-nvmeof@disk.service
mount /mnt/uuid
mount /mnt/id
[ "$(cat /mnt/uuid/file)" = hello ]
[ "$(cat /mnt/id/file)" = "still served" ]

step "a target that comes after the boot"
if active ublk-nvmeof@late.service; then fail "it is active without a target"; fi
lab_target nqn=$late svc=4421 size=64
sed -i 's/^nqn.*/&\ntrsvcid = 4421/' /etc/ublk-nvmeof/late.conf
until_true 60 active ublk-nvmeof@late.service
until_true 30 test -b /dev/disk/by-path/nvmeof-$late-ns-1

step "a server that was started by hand outlives its session"
lab_target nqn=$late-2 svc=4422 size=64
systemd-run --quiet --scope --unit=session-test ublk-nvmeof connect -a $LAB_ADDR -s 4422 -n $late-2 --nr-io-queues=1
systemctl stop session-test.scope 2>/dev/null || true
scope=$(systemctl list-units --no-legend --plain 'ublk-nvmeof-*.scope' | cut -d' ' -f1)
[ -n "$scope" ] || fail "no scope"
ublk-nvmeof list | grep -q "$late-2"
systemctl stop "$scope"
if ublk-nvmeof list | grep -q "$late-2"; then fail "the scope has not ended"; fi

step "the package is not removed while servers run"
if dpkg -r ublk-nvmeof; then fail "removed"; fi
active ublk-nvmeof@disk.service

step "a target that is gone at the shutdown"
lab_target_down $late
echo "written last" >/mnt/uuid/last
step shutdown
exit $((failures > 0))
