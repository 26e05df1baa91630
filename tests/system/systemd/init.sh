#!/bin/bash
# Becomes systemd as PID 1: init.sh WORK TREE PYTHON LIBRARIES, in new mount, pid, cgroup, uts and ipc namespaces.
# The root is the host's own below a tmpfs, with TREE (what `ksmd install` made) laid over it, so
# that nothing that happens in here is left behind.
set -euo pipefail
work=$1 tree=$2 python=$3 libraries=$4

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$work/layers"
mkdir "$work/layers/upper" "$work/layers/work"
mount -t overlay overlay \
    -o "lowerdir=/,upperdir=$work/layers/upper,workdir=$work/layers/work" "$work/root"
root=$work/root

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty userfaultfd; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir "$root/run/lock" "$root/run/test"
mount --bind "$work/shared" "$root/run/test"

# with its timestamps, or what is compiled there would be compiled again at each start
cp -R --preserve=mode,timestamps "$tree/." "$root/"
# The interpreter and its libraries may lie in a home directory, which services do not see.
mount --bind "$python" "$root/opt/python"
mount --bind "$libraries" "$root/opt/libraries"
# and so may its libpython, which must not be mixed up with the distribution's
echo /opt/python/lib >"$root/etc/ld.so.conf.d/00-test.conf"
chroot "$root" /sbin/ldconfig

# What the host's own boot needs and this one does not; none of it is under test.
: >"$root/etc/machine-id"
rm -rf "$root/var/log/journal"
units=$root/etc/systemd/system
mkdir -p "$units" "$root/etc/systemd/journald.conf.d"
rm -rf "$units"/*.wants/*
for unit in getty.target systemd-logind.service systemd-udevd.service systemd-udev-trigger.service \
    systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-timesyncd.service \
    systemd-networkd.service systemd-random-seed.service systemd-machine-id-commit.service \
    systemd-modules-load.service systemd-sysctl.service systemd-firstboot.service \
    systemd-journal-flush.service systemd-remount-fs.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service systemd-hwdb-update.service systemd-pstore.service \
    ldconfig.service e2scrub_reap.service dev-hugepages.mount dev-mqueue.mount \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount; do
    ln -sfn /dev/null "$units/$unit"
done
# no unit of this machine is generated, and every daemon-reload would run them all
mkdir -p "$root/etc/systemd/system-generators"
for generator in "$root"/lib/systemd/system-generators/*; do
    ln -sfn /dev/null "$root/etc/systemd/system-generators/${generator##*/}"
done
# dpkg would have the index of all manual pages made anew
rm -f "$root/var/lib/man-db/auto-update"
printf '[Journal]\nStorage=volatile\nForwardToConsole=no\n' >"$root/etc/systemd/journald.conf.d/test.conf"

cd "$root"
mkdir -p mnt
pivot_root . mnt
umount -l /mnt
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    container=ksmd-test \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
