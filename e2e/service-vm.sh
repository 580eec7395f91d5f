#!/bin/bash
# service-vm.sh KERNEL WHAT runs e2e/service.sh in a VM with systemd, and looks at the
# shutdown. The package is in build, and for "life" a newer one in build/newer.
set -euo pipefail

cd "$(dirname "$0")/.."
export UN_SERVICE=$2
out=build/log/service-$1-$2
mkdir -p "$out"
build/vm --kernel "$1" --mem 2G --timeout 15m --out "$out" --systemd e2e/service-before.sh -- e2e/service.sh
e2e/service-after.sh "$out/console.log"
