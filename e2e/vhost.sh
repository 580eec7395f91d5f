#!/bin/bash
# A disk by vhost-user-blk for a stock Debian kernel under QEMU, natively on this machine: a
# target in memory, RoCEv2 over UDP, no module. The guest boots, makes file systems, verifies
# data with four queues, reboots, sees a new size, is killed and started again. Then the
# server is upgraded and killed below the guest while it verifies. Between the kills the
# target drops connections, and changes its grant. At last a guest that writes and reads is
# migrated to another QEMU, whose disk another server serves.
#
#	e2e/vhost.sh PROGRAM VM [KERNEL [KILLS [UPGRADES [STEPS]]]]
#
# STEPS is guest, server, migrate, or several with commas between them. The variable VHOST_FLAGS has further
# flags for connect, such as --zero-copy.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "$1") vm=$(realpath "$2") kernel=${3:-6.12} kills=${4:-3} upgrades=${5:-2} steps=${6:-guest,server,migrate}
work=$(mktemp -d)
nqn=nqn.2026-01.org.example:vm
addr=127.$((2 + $$ % 250)).$((RANDOM % 250)).1 # nobody else's
port=$((20000 + $$ % 10000))
socket=$work/disk-1.sock
# How long the guest verifies while the server is upgraded, and while it is killed.
upgrade_time=$((upgrades * 4 + 5)) kill_time=$((kills * 7 + 10))
guest=
VHOST_FLAGS=${VHOST_FLAGS:-}
un() { "$program" "$@" --run-dir "$work/run"; }
other() { "$program" "$@" --run-dir "$work/other"; } # the server on the other side of a migration

clear_away() {
	status=$?
	[ -z "$guest" ] || kill -9 "$guest" 2>/dev/null || true
	if [ $status != 0 ]; then
		echo "vhost: failed" >&2
		tail -n 20 "$work"/*/ctrl*/log >&2 || true
	fi
	# What is over already is no error.
	un disconnect -n $nqn --force >/dev/null 2>&1 || true
	other disconnect -n $nqn --force >/dev/null 2>&1 || true
	un target stop >/dev/null 2>&1 || true
	rm -rf "$work"
	exit $status
}
trap clear_away EXIT

# boot runs a step of the guest, in place of the shell that calls it.
boot() {
	exec "$vm" --kernel "$kernel" --parallel --mem 1G --timeout 10m "${@:2}" --vhost-user-blk "$socket" -- sh e2e/vhost-guest.sh $1 "$upgrade_time" "$kill_time"
}

# await waits until a file has a line.
await() {
	for _ in $(seq 1200); do
		! grep -qs "$2" "$1" || return 0
		sleep 0.1
	done
	echo "vhost: no $2 in time" >&2
	return 1
}

truncate -s 512M "$work/disk"
un target --background -a $addr -s $port -n $nqn --namespace "file=$work/disk"
un connect -a $addr -s $port -n $nqn -i 2 -c 1 -k 1 --provider roce --vhost-socket "$work/disk-{nsid}.sock" $VHOST_FLAGS

guest_steps() {
	echo "== file systems, verify, reboot, resize"
	boot first --reboot >"$work/first" 2>&1 &
	guest=$!
	await "$work/first" 'want 768 MiB'
	un target namespace resize 1 768MiB
	wait $guest || { cat "$work/first"; exit 1; }
	guest=
	cat "$work/first"

	echo "== a guest that is killed, and started again"
	boot kills >"$work/load" 2>&1 &
	guest=$!
	await "$work/load" 'kills begin'
	sleep 3
	kill -9 $guest
	wait $guest || true
	guest=
	(boot again)
}

# next ends the server in a way, and waits until the next one listens.
next() {
	kill -0 $guest || { cat "$work/load"; exit 1; }
	local begin
	begin=$(date +%s%N)
	if [ "$1" = killed ]; then
		kill -9 "$(un list -v -o json | grep -o '"pid": *[0-9]*' | grep -o '[0-9]*' | head -n 1)"
		un recover $nqn >/dev/null 2>&1
	else
		un upgrade "$socket" >/dev/null
	fi
	echo "$1: the next server listened after $((($(date +%s%N) - begin) / 1000000)) ms"
}

server_steps() {
	echo "== the server is upgraded $upgrades times and killed $kills times below the guest"
	boot load >"$work/load" 2>&1 &
	guest=$!
	await "$work/load" 'upgrades begin'
	[[ $VHOST_FLAGS != *--zero-copy* ]] || un list -v | grep 'zero copy.*[KMG]iB at present'
	for _ in $(seq "$upgrades"); do
		sleep 2
		next upgraded
	done
	await "$work/load" 'kills begin'
	for i in $(seq "$kills"); do
		sleep 0.$((RANDOM % 10))
		case $((i % 3)) in
		1) un target drop >/dev/null ;;
		2) un target grant $((1 + RANDOM % 2)) >/dev/null ;;
		esac
		sleep 0.$((RANDOM % 10))
		next killed
		sleep 1
	done
	wait $guest || { cat "$work/load"; exit 1; }
	guest=
	cat "$work/load"
	over_upgrades=$(longest "$work/load" 'upgrades begin' 'kills begin') over_kills=$(longest "$work/load" 'kills begin' none)
	echo "longest request: $over_upgrades ms over an upgrade, $over_kills ms over a kill"
	[ "$over_upgrades" -le 1000 ] && [ "$over_kills" -le 2000 ]
	un list -v
}

# longest FILE FROM TO: the longest request, in ms, of fio's reports between two lines.
longest() {
	awk -v from="$2" -v to="$3" '
		index($0, from) { on = 1 }
		index($0, to) { on = 0 }
		on && /clat \(/ {
			unit = /\(nsec/ ? 1e-6 : /\(usec/ ? 1e-3 : 1
			match($0, /max=[^,]*/)
			text = substr($0, RSTART + 4, RLENGTH - 4)
			ms = text * unit * (text ~ /k$/ ? 1e3 : text ~ /M$/ ? 1e6 : 1)
			if (ms > most) most = ms
		}
		END { printf "%d\n", most + 0.5 }' "$1"
}

migrate_steps() {
	echo "== a guest migrates to another server"
	other connect -a $addr -s $port -n $nqn -q $nqn:other -i 2 -c 1 -k 1 --provider roce --vhost-socket "$work/other-{nsid}.sock" $VHOST_FLAGS
	"$vm" --kernel "$kernel" --cpus 2 --mem 512M --vhost-user-blk "$socket" --migrate-to "$work/other-1.sock"
	for _ in $(seq 50); do # the server sees a little later than the VM that its guest has gone
		! other disconnect -n $nqn || return 0
		sleep 0.1
	done
	return 1
}

case ,$steps, in *,guest,*) guest_steps ;; esac
case ,$steps, in *,server,*) server_steps ;; esac
case ,$steps, in *,migrate,*) migrate_steps ;; esac
echo "== done"
