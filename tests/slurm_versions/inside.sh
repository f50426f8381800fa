#!/usr/bin/env bash
# Become a host of another Debian release and run the tests there. Only run.sh starts this, in fresh namespaces.
#   inside.sh ROOT CHECKOUT [PYTEST_ARGUMENT…]
set -euo pipefail
root=$1 checkout=$2
shift 2
name=slurm-versions

# What this machine's Python consists of: its prefix; of a Python below /usr, whose prefix is everything, its files.
read -r -d '' list_python <<'PYTHON' || true
import os, sys, sysconfig
if sys.base_prefix != "/usr":
    print(sys.base_prefix)
else:
    print(sysconfig.get_path("stdlib"))
    path = sys.executable
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        print(os.path.normpath(path))
PYTHON

# Show a file or folder of this machine at the same path below the new root.
show() {
    if [ -d "$1" ]; then
        mkdir -p "$root$1"
    else
        mkdir -p "$(dirname "$root$1")" && touch "$root$1"
    fi
    mount --bind "$1" "$root$1"
}

mount --bind "$root" "$root"
for folder in tmp run root mnt var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
show "$checkout"
show "$(realpath "$checkout/.venv")"
"$checkout/.venv/bin/python" -c "$list_python" | while read -r path; do show "$path"; done

hostname "$name"
printf '127.0.0.1 localhost\n192.0.2.1 %s\n' "$name" >"$root/etc/hosts"
: >"$root/etc/resolv.conf"
ip link set lo up
ip link add eth0 type veth peer name eth1
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up

cd "$root"
mkdir -p mnt/old
pivot_root . mnt/old
cd "$checkout"
umount -l /mnt/old
rmdir /mnt/old
ldconfig
run=(env -i HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" REQUIRE_SLURM=1
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin .venv/bin/python)
"${run[@]}" -c 'import bz2, ctypes, lzma, sqlite3, ssl, uuid'
echo "testing on $(slurmctld -V), $(mariadbd --version | grep -o '[0-9.]*-MariaDB' || true)"
# Only the files that have such tests: to look through all of them takes longer, and imports torch.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.slurm' tests | grep -v '^tests/e2e/' | sort)
# Of whole jobs the one that goes otherwise on newer versions.
files+=(tests/e2e/test_preemption.py)
# Not exec: this shell is process 1 here and collects what the daemons leave.
"${run[@]}" -m pytest -n 2 --dist worksteal -p no:cacheprovider -m slurm "${files[@]}" "$@"
