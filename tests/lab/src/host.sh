#!/bin/sh
# One host of the scenario `two-hosts`: a root of its own with systemd as process 1.
#
#   host.sh enter CGROUP NETNS NAME DIR SHOW...
#   host.sh boot  NAME DIR SHOW...           process 1 of the host, until systemd takes its place
#
# CGROUP is a new folder of the machine's cgroup2 tree, NETNS its network, NAME the host's name.
# The host has the folder DIR/lab as /lab, and sees each folder SHOW at its own path, read-only.
#
# The host's root is the machine's, under an overlay that lives in memory. Mounts are private, so
# nothing that the host writes reaches the machine, and all of it goes when its last process does.
set -eu

enter() {
    cgroup=$1 netns=$2
    shift 2
    mkdir -- "$cgroup"
    echo $$ >"$cgroup/cgroup.procs"
    # (Only now: in there, /sys shows no cgroups.)
    exec ip netns exec "$netns" unshare --mount --uts --ipc --cgroup --pid --fork --kill-child sh "$0" boot "$@"
}

boot() {
    name=$1 dir=$2
    shift 2
    mount --make-rprivate /
    mkdir -p -- "$dir/mnt"
    mount -t tmpfs -o mode=755 lab "$dir/mnt"
    root=$dir/mnt/root
    mkdir -- "$dir/mnt/upper" "$dir/mnt/work" "$root"
    mount -t overlay -o "lowerdir=/,upperdir=$dir/mnt/upper,workdir=$dir/mnt/work" lab "$root"

    # Of the kernel's settings only those of the network are the host's own.
    mount -t proc proc "$root/proc"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t tmpfs -o mode=755 lab "$root/dev"
    mkdir -- "$root/dev/net" "$root/dev/shm" "$root/dev/pts"
    for node in null zero full random urandom tty net/tun; do
        : >"$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    mount -t tmpfs -o mode=755 lab "$root/run"
    mount -t tmpfs -o mode=1777 lab "$root/tmp"
    for shown in "$@"; do
        mkdir -p -- "$root$shown"
        mount --bind "$shown" "$root$shown"
        mount -o remount,bind,ro "$root$shown"
    done
    mkdir -p -- "$root/lab"
    mount --bind "$dir/lab" "$root/lab"

    # A fresh host: none of the machine's services, networks' names or Tandem.
    rm -rf -- "$root"/etc/systemd/system/* "$root"/usr/lib/systemd/system/*.wants \
        "$root"/etc/swanctl/conf.d/* "$root/etc/tandem" "$root/etc/default/tandem" \
        "$root/var/lib/tandem" "$root"/usr/local/bin/tandem* "$root/var/log/journal" \
        "$root/etc/fstab" "$root/etc/sysctl.d/60-tandem.conf"
    hostname "$name"
    echo "$name" >"$root/etc/hostname"
    echo "$name" | md5sum | cut -c 1-32 >"$root/etc/machine-id.new"
    mv -f -- "$root/etc/machine-id.new" "$root/etc/machine-id"
    cp -- "$dir/lab/hosts" "$root/etc/hosts"
    cp -r -- "$dir/lab/etc/." "$root/etc/"
    ln -s lab.target "$root/etc/systemd/system/default.target"

    mkdir -p -- "$root/oldroot"
    cd -- "$root"
    pivot_root . oldroot
    cd /
    umount -l /oldroot
    exec env -i container=lab PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --log-target=journal-or-kmsg --show-status=no
}

"$@"
