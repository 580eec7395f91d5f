#!/bin/bash
# The host's side of frozen.sh: what it prints makes that stop the other VM.
set -euo pipefail
. e2e/lab.sh
export PATH=$PWD/build:$PATH
nqn=$LAB_NQN
live() { ublk-nvmeof list | grep -qE "^/dev/ublkb0 .* $1( |$)"; }
now() { date +%s%3N; }
# within SECONDS COMMAND…: it comes true.
within() {
	local end=$(($(date +%s) + $1))
	until "${@:2}"; do
		if [ "$(date +%s)" -ge $end ]; then
			echo "not within $1 s: ${*:2}" >&2
			ublk-nvmeof list -v >&2
			exit 1
		fi
		sleep 0.1
	done
}
lab_far 10.0.3.1
ublk-nvmeof connect -a 10.0.3.2 -n $nqn -i 2 -W 1 -P 1 -k 5 -c 1 -l -1 --device-id 0
cd "$(mktemp -d)"
fio --name=verify --filename=/dev/ublkb0 --direct=1 --ioengine=io_uring --rw=randrw --bsrange=512-64k --iodepth=8 --serialize_overlap=1 --size=32m \
	--randrepeat=0 --time_based --runtime=600 --verify=crc32c --verify_backlog=64 --output-format=json --output=fio.json &
fio=$!
sleep 5
echo freeze
within 30 live connecting
within 120 live live
sleep 3
pkill -INT -x fio
wait $fio || true
awk -F: '/"error"/ { e += $2 } /"total_err"/ { e += $2 } END { exit e > 0 }' fio.json
echo "no error; longest I/O: $(awk -F: '/"max"/ && $2 + 0 > m { m = $2 + 0 } END { printf "%.1f s", m / 1e9 }' fio.json)"
dd if=/dev/ublkb0 of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null

echo stop
sleep 1
began=$(now)
timeout 20 ublk-nvmeof disconnect --force -n $nqn
echo "disconnect --force from a target that stands still: $(($(now) - began)) ms"
! pgrep -x ublk-nvmeof
