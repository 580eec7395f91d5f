#!/bin/bash
# Runs the commands of the README: each block that is marked as sh, in order, in one
# shell, as a reader would paste them. Ends 0 only if every command did.
set -euo pipefail
cd "$(dirname "$0")/.."
commands=$(awk '/^```sh$/ { inside = 1; next } /^```$/ { inside = 0 } inside' README.md)
[ -n "$commands" ] || { echo "readme: README.md has no block of commands" >&2; exit 1; }
bash -euxo pipefail -c "$commands" && exit
echo "readme: a command of README.md failed" >&2
build/ublk-nvmeof disconnect -n nqn.2026-01.org.example:disk --force >/dev/null 2>&1
build/ublk-nvmeof target stop >/dev/null 2>&1
exit 1
