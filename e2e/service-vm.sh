#!/bin/bash
# service-vm.sh KERNEL WHAT runs e2e/service.sh in a VM with systemd, and looks at the shutdown.
# The package is in build, and for "life" a newer one in build/newer. "boot" is two boots of one
# machine: the package is installed and configured after the first one.
set -euo pipefail

cd "$(dirname "$0")/.."
out=build/log/service-$1-$2
mkdir -p "$out"
rm -f "$out"/{disk.img,installed.log}
# vm WHAT [FLAG…]
vm() {
	UN_SERVICE=$1 build/vm --kernel "$kernel" --mem 2G --timeout 15m --out "$out" --systemd e2e/service-before.sh "${@:2}" -- e2e/service.sh
}
kernel=$1
if [ "$2" = boot ]; then
	vm install --disk "$out/disk.img"
	mv "$out/console.log" "$out/installed.log"
	vm boot --disk "$out/disk.img"
	rm "$out/disk.img"
else
	vm "$2"
fi
UN_SERVICE=$2 e2e/service-after.sh "$out/console.log"
