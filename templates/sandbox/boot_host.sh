#!/bin/sh
# Become one host of the sandbox: run inside fresh network, UTS and mount namespaces, then hold them open.
#   boot_host.sh HOST_NAME ETC_DIR MNT_DIR|-
# ETC_DIR holds hosts and resolv.conf; MNT_DIR is what this host alone sees as /mnt/node ("-": nothing).
set -eu
host_name=$1 etc_dir=$2 mnt_dir=$3

hostname "$host_name"
mount --bind "$etc_dir/hosts" /etc/hosts
# A link-local IPv6 address is unusable for its first second, and gloo may choose it.
for rail in /proc/sys/net/ipv6/conf/ib*/disable_ipv6; do
    if [ -w "$rail" ]; then echo 1 >"$rail"; fi
done
# Without this, every failed look-up waits for a name server that this network cannot reach.
if [ -e /etc/resolv.conf ]; then mount --bind "$etc_dir/resolv.conf" /etc/resolv.conf; fi
# /sys/class/net must show this host's rails; cgroups below it stay as they were.
if mount --rbind /sys/fs/cgroup "$etc_dir/cgroup" 2>/dev/null; then
    mount -t sysfs sysfs /sys
    mount --rbind "$etc_dir/cgroup" /sys/fs/cgroup
    umount -l "$etc_dir/cgroup"
fi
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
if [ "$mnt_dir" != - ]; then mount --bind "$mnt_dir" /mnt/node; fi
exec sleep infinity
