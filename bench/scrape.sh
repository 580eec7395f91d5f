#!/bin/bash
# Compares a server that is scraped each second with one that is not: 32 devices, 4 KiB
# random reads at depth 32 of one of them by NBD, in turns. Needs fio with the engine nbd,
# and curl; no root, VM or RDMA device.
#
#	bench/scrape.sh [ROUNDS [SECONDS]]
#
# On a machine with other work the IOPS tell little. The CPU time of the server per
# request is steadier.
set -euo pipefail

program=$(dirname "$0")/../build/ublk-nvmeof
rounds=${1:-8} seconds=${2:-5}
nqn=nqn.2026-01.org.example:scrape address=127.0.0.77 metrics=127.0.0.77:9477
run=$(mktemp -d)
un() { "$program" --run-dir "$run" "$@" >>"$run/log"; }
end() {
	un disconnect -n $nqn --force || true
	un target stop || true
	rm -rf "$run"
}
trap end EXIT

namespaces=()
for _ in $(seq 32); do namespaces+=(--namespace ram=16MiB); done
un target -a $address --provider roce --background -n $nqn "${namespaces[@]}"
un connect -a $address -n $nqn --provider roce --nbd-socket "$run/nbd.sock" --metrics-listen $metrics -Q 32 --max-io-size 64KiB
pid=$(curl -s --unix-socket "$run/ctrl0/control.sock" http://server/v1/status | grep -o '"pid":[0-9]*' | cut -d: -f2)

# ticks is the CPU time of the server in hundredths of a second.
ticks() { awk '{print $14 + $15}' "/proc/$pid/stat"; }

# measure writes one line: how, IOPS, and microseconds of CPU per request.
measure() {
	local before after iops
	before=$(ticks)
	fio --name=reads --ioengine=nbd --uri="nbd+unix:///1?socket=$run/nbd.sock" --rw=randread --bs=4k --iodepth=32 \
		--time_based --runtime="$seconds" --output-format=terse --output="$run/fio" >>"$run/log"
	after=$(ticks)
	iops=$(grep '^3;' "$run/fio" | cut -d';' -f8)
	awk -v how="$1" -v iops="$iops" -v ticks=$((after - before)) -v s="$seconds" \
		'BEGIN {printf "%s %d %.2f\n", how, iops, ticks * 10000 / (iops * s)}'
}

for _ in $(seq "$rounds"); do
	measure without
	while sleep 1; do curl -s http://$metrics/metrics >/dev/null; done &
	scraper=$!
	measure with
	kill $scraper
	wait $scraper 2>/dev/null || true
done | tee "$run/results"

echo
for how in without with; do
	for column in 2 3; do
		grep "^$how " "$run/results" | cut -d' ' -f$column | sort -n | awk -v how=$how -v what="$([ $column = 2 ] && echo IOPS || echo "us of CPU per request")" \
			'{v[NR] = $1} END {print how " scrapes: median " v[int((NR + 1) / 2)] " " what}'
	done
done
before=$(ticks)
for _ in $(seq 100); do curl -s http://$metrics/metrics >/dev/null; done
awk -v ticks=$(($(ticks) - before)) 'BEGIN {printf "a scrape: %.1f ms of CPU\n", ticks / 10}'
