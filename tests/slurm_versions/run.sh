#!/usr/bin/env bash
# The tests marked `slurm` (of tests/e2e only the preemption) on the Slurm of another Debian release: `make test-slurm-versions`.
#
#   run.sh [SUITE [PYTEST_ARGUMENT…]]     SUITE: trixie (Debian 13), or any other that the mirror has
#   DEBIAN_MIRROR=http://…                instead of the mirror that this machine's apt uses
#
# The release's packages are installed once, into .cache/slurm-root/SUITE. The tests run with that folder as / and with
# this checkout, its .venv and this machine's Python mounted into it (inside.sh), in PID, mount and network namespaces
# of their own: with the script's end, whatever ends it, their processes, mounts and interfaces are gone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
suite=${1:-trixie}
shift || true
cache=$checkout/.cache/slurm-root
root=$cache/$suite
log=$cache/$suite.log
# Slurm, what the sandbox and the tests need beside it, and the libraries of a Python that was built on this machine.
packages=slurm-wlm,slurmdbd,munge,mariadb-server,iproute2,procps,netbase,gcc,libc6-dev
packages+=,libffi8,libsqlite3-0,libreadline8t64,libncursesw6,libssl3t64,libexpat1,libuuid1,libstdc++6

die() {
    printf 'test-slurm-versions: NOT TESTED on %s: %s\n' "$suite" "$1" >&2
    exit 1
}

# Runs a command in namespaces that end with this script. (A shell waits for a background child interruptibly.)
in_namespaces() {
    setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$@" 9>&- </dev/null &
    child=$!
    wait "$child"
}

# The mirror of this machine's own Debian release, as apt understands its sources; else Debian's default.
find_mirror() {
    local codename uri=
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && [ "$ID" = debian ] && echo "${VERSION_CODENAME:-}") || codename=
    if [ -n "$codename" ]; then
        # shellcheck disable=SC2016
        uri=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' |
            awk -v release="$codename" '$1 == release && $2 == "main" && $3 ~ /^https?:/ && !seen++ { print $3 }')
    fi
    echo "${uri:-http://deb.debian.org/debian}"
}

build_root() {
    local mirror=${DEBIAN_MIRROR:-} line options=(--aptopt='Acquire::Languages "none"')
    command -v mmdebstrap >/dev/null || die "mmdebstrap is not installed: apt-get install mmdebstrap"
    [ -n "$mirror" ] || mirror=$(find_mirror)
    # How this machine's apt reaches a mirror: proxies, time-outs, checks that are off for a frozen mirror.
    while read -r line; do options+=(--aptopt="$line"); done < <(apt-config dump | grep -E '^Acquire::(https?::|Check-)')
    echo "installing the packages of Debian $suite from $mirror into $root"
    rm -rf "$root" "$root.partial"
    in_namespaces mmdebstrap --variant=minbase --mode=root --include="$packages" \
        "${options[@]}" --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$root.partial" "$mirror" >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        die "its packages could not be installed from $mirror (above; all of it: $log)"
    }
    mv "$root.partial" "$root"
    echo "$packages" >"$root.packages"
}

[ "$(id -u)" = 0 ] || die "only root can install a Debian root and mount into it"
[ -x "$checkout/.venv/bin/python" ] || die "there is no .venv: make install"
child=
trap '[ -z "$child" ] || kill -KILL "$child" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
began=$SECONDS
[ "$(cat "$root.packages" 2>/dev/null)" = "$packages" ] || build_root
built=$SECONDS
in_namespaces --net --uts --ipc "$here/inside.sh" "$root" "$checkout" "$@"
echo "Debian $suite: packages $((built - began)) s, tests $((SECONDS - built)) s"
