#!/bin/busybox sh
# Init of the machine whose power is cut: a host on a disk, reached from outside. It says its
# administrator's token, and never ends.
B=/bin/busybox
if [ "$1" != again ]; then
    # A root that can be left again, as the data process does.
    $B mkdir /new
    $B mount -t tmpfs new /new
    $B cp -a /init /bin /bed /modules /lib* /usr /new
    $B mkdir /new/proc /new/sys /new/dev /new/tmp /new/disk
    exec $B switch_root /new /init again
fi
export PATH=/bin:/bed:/usr/sbin:/sbin:/usr/bin HOME=/tmp
$B --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in MODULES; do insmod /modules/$module.ko || echo "bed: FAILED loading $module"; done
mount -t cgroup2 groups /sys/fs/cgroup
ifconfig lo 127.0.0.1
ifconfig eth0 10.0.2.15 netmask 255.255.255.0
# The admin API listens on loopback only, and the outside of the emulator is not that.
echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
nft 'add table ip bed; add chain ip bed in { type nat hook prerouting priority -100; };
    add rule ip bed in tcp dport 8082 dnat to 127.0.0.1:8081' || echo "bed: FAILED nft"
i=0
while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
mount -t ext4 /dev/vda /disk || echo "bed: FAILED mounting the disk"
insula serve --data /disk/data --listen 0.0.0.0:8080 --admin 127.0.0.1:8081 --workers 1 \
    --instances 10 2>&1 &
while [ ! -s /disk/data/admin.token ]; do sleep 0.1; done
echo "bed: token $(cat /disk/data/admin.token)"
wait
echo "bed: FAILED the host ended"
sleep 1000
