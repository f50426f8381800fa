#!/usr/bin/env bash
# install.sh VENV [locked|oldest|newest]: VENV has this checkout (editable) and every package of training and the tests.
#   locked  the versions of locked.txt, each file checked against its hash, and of torch.txt
#   oldest  the same test tools, but the lowest version that pyproject.toml admits of every package that it names
#   newest  whatever pip finds today within the ranges of pyproject.toml
# PYTHON is the interpreter of a new VENV. TORCH replaces the choice of torch's build: TORCH='torch===2.13.0'.
set -euo pipefail

venv=$1 set=${2:-locked}
here=$(dirname "$0")
python=${PYTHON:-python3}
package='.[train,dev,report]'

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$python is $("$python" -V 2>&1): training needs Python 3.11 or newer. make PYTHON=/path/to/python3.11" >&2
  exit 2
}
test -x "$venv/bin/python" || "$python" -m venv "$venv"

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# pip takes a build for CPUs (2.13.0+cpu) before the plain one wherever it finds both, in PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL. "===" admits the plain one (CUDA) alone: that is what a machine with a GPU needs.
choose_torch() {
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo "torch===$1"; else echo "torch==$1"; fi
}
version_in() { sed -nE 's/^torch==([^ ;]+).*/\1/p' "$1"; }

echo "installing into $venv ($set versions)"
case $set in
  locked)
    pip_install --require-hashes --no-deps -r "$here/locked.txt"
    pip_install -c "$here/torch.txt" "${TORCH:-$(choose_torch "$(version_in "$here/torch.txt")")}"
    ;;
  oldest)
    grep -vE '^(torch|triton|nvidia-)' "$here/oldest.txt" >"$venv/oldest.txt"
    pip_install --no-deps -r "$venv/oldest.txt"
    pip_install -c "$here/oldest.txt" "${TORCH:-$(choose_torch "$(version_in "$here/oldest.txt")")}"
    ;;
  newest)
    pip_install --upgrade "${TORCH:-torch}"
    pip_install --upgrade --upgrade-strategy eager "$package"
    ;;
  *)
    echo "install.sh: '$set' is none of locked, oldest, newest" >&2
    exit 2
    ;;
esac
# hatchling is one of the packages above: nothing is fetched to build.
pip_install --no-deps --no-build-isolation -e .
"$venv/bin/python" -m pip --disable-pip-version-check check >/dev/null || {
  echo "The versions of $set do not satisfy pyproject.toml (make lock):" >&2
  "$venv/bin/python" -m pip --disable-pip-version-check check >&2
  exit 1
}
