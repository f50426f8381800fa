#!/usr/bin/env bash
# lock.sh: locked.txt, torch.txt and oldest.txt follow from pyproject.toml and from what the index has today.
# UV is the program that resolves.
set -euo pipefail

cd "$(dirname "$0")/.."
here=requirements
# The version that the tests run with; ranges are in pyproject.toml.
torch=2.13.0
# The command line runs on Python 3.10 too; the packages of training do not.
everything() { printf '%s\n' '.[dev,report]' '.[train] ; python_full_version >= "3.11"' "torch==$torch ; python_full_version >= \"3.11\""; }
resolve() { "$UV" pip compile - --universal --quiet --no-header --no-annotate --no-emit-package janus-cluster "$@"; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
everything | resolve --python-version 3.10 >"$tmp/all.txt"

# Which build of torch (CPU, CUDA) is installed depends on the machine, so that torch and what a CUDA build brings along
# have versions here and no hashes.
of_torch='^(torch|triton|cuda-|nvidia-)'
grep -E "$of_torch" "$tmp/all.txt" >"$tmp/torch.txt"
mapfile -t omit < <(sed -E 's/==.*//; s/^/--no-emit-package=/' "$tmp/torch.txt" | sort -u)
everything | resolve --python-version 3.10 --generate-hashes "${omit[@]}" >"$tmp/locked.txt"

# The lowest versions are those of what users get. Test tools keep the locked ones: what is named with "==" has no lower.
direct() {
  "$UV" pip compile pyproject.toml "$@" --no-deps -c "$tmp/all.txt" --python-version 3.11 --quiet --no-header --no-annotate
}
direct --extra train --extra report | sed 's/==.*//' >"$tmp/users"
direct --extra dev | grep -vxf <(sed 's/.*/&==.*/' "$tmp/users") >"$tmp/tools"
{ echo '.[train,report]'; cat "$tmp/tools"; } |
  resolve --python-version 3.11 --resolution lowest-direct >"$tmp/oldest.txt"

for name in locked torch oldest; do
  { echo "# Written by make lock. Used by requirements/install.sh."; cat "$tmp/$name.txt"; } >"$here/$name.txt"
done
