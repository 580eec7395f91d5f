#!/bin/bash
# Compares the API of the packages that docs/embedding.md promises to keep compatible with that of the
# last release, which is the newest tag vX.Y.Z that HEAD contains, or of the commit that is the
# only argument. Ends 0 if nothing became incompatible. Before the first release there is nothing
# to compare, and it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
apidiff="go run golang.org/x/exp/cmd/apidiff@v0.0.0-20261113113407-e3970619a1a4"
packages=$(awk '/^<!-- promised -->$/ { inside = 1; next } /^<!-- end -->$/ { inside = 0 } inside && /^\| `/ { gsub(/`/, "", $2); print $2 }' docs/embedding.md)
[ -n "$packages" ] || { echo "apidiff: docs/embedding.md names no packages" >&2; exit 1; }
old=${1-$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null || true)}
[ -n "$old" ] || { echo "apidiff: there is no release yet, so every change is compatible"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/tree"
git archive "$old" | tar -x -C "$dir/tree"
broken=
for p in $packages; do
	[ -d "$dir/tree/$p" ] || continue # it is new
	(cd "$dir/tree" && $apidiff -w "$dir/old" "ublk-nvmeof/$p")
	changes=$($apidiff -incompatible "$dir/old" "ublk-nvmeof/$p")
	[ -z "$changes" ] || { echo "$p, incompatible with $old:"; echo "$changes"; broken=1; }
done
[ -z "$broken" ]
