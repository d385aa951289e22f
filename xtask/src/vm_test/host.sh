#!/bin/busybox sh
# In the bed: a machine of a tenant's with the distribution's kernel, through its whole life. Prints a
# line for each thing that is shown.
name=host
. /bed/lib
M=acme/first

serve
do_it insula tenants set acme --cpu-limit 1500m --memory 512MiB
images
define --vcpus 2
do_it insula machine start $M
is running || failed "it is not running"
sit_down
within 200 "init" printed @ready
ask 'echo "kernel $(uname -r) on $(nproc)"' '^kernel [0-9].* on 2'
shown "a machine with $(grep -o '^kernel .*' /tmp/screen | tr -d '\r')"

ask 'echo kept > /kept; sync; echo stored' stored
do_it insula machine pause $M
is paused || failed "it is not paused"
do_it insula machine resume $M
ask 'echo going on' 'going on'
shown "paused and resumed"

before=$(monitor)
kill -9 "$host"
wait "$host"
serve
within 10 "running machine" is running
[ "$(monitor)" = "$before" ] || failed "it is another process"
sit_down
ask 'echo still here' 'still here'
shown "killed, and its successor finds the same monitor and console"

do_it insula machine snapshot $M
ask 'echo lost > /kept; sync; echo overwritten' overwritten
do_it insula machine stop $M --force
do_it insula machine restore $M
sit_down
ask 'echo 3 > /proc/sys/vm/drop_caches; echo "its disk: $(cat /kept)"' 'its disk: kept'
M=acme/second
define --vcpus 2
do_it insula machine restore $M --from first
sit_down
ask 'echo two > /kept; sync; echo "a clone since $(cut -d. -f1 /proc/uptime)"' 'a clone since'
do_it insula machine delete $M --force
M=acme/first
sit_down
ask 'echo 3 > /proc/sys/vm/drop_caches; echo "still: $(cat /kept)"' 'still: kept'
before=$(monitor)
shown "a snapshot, gone on with from where it was, and a clone of it beside"

do_it insula machine create $M --disk-limit 4MB
echo 'reboot -f' >&3
anew() { new=$(monitor) && [ -n "$new" ] && [ "$new" != "$before" ] && is running; }
within 30 "new monitor" anew
sit_down
within 200 "init after the reboot" printed @ready
ask 'echo "it $(cat /kept)"' 'it kept'
shown "a guest that reboots goes on with its disk"
# A second's worth at once, and then as much each second.
ask 'echo 3 > /proc/sys/vm/drop_caches; t=$(cut -d. -f1 /proc/uptime); dd if=/dev/vda of=/dev/null bs=64k count=384 2> /dev/null && echo "24 MiB: $(($(cut -d. -f1 /proc/uptime) - t)) seconds"' '24 MiB: [4-9] seconds'
shown "a disk with a limit of 4 MB each second, $(grep -o '24 MiB: .*' /tmp/screen | tr -d '\r')"

echo 'poweroff -f' >&3
within 60 "end" is stopped
shown "a guest that turns itself off is stopped"

do_it insula machine start $M
kill -9 "$(monitor)"
within 1 "failure" is failed
insula machine show $M | grep -q 'killed by signal 9' || failed "it does not say why"
do_it insula machine start $M
do_it insula machine stop $M --force
is stopped || failed "it is not stopped"
do_it insula machine delete $M
do_it insula tenants delete acme
[ -z "$(ls "$INSULA_DATA"/machines)" ] || failed "files are left: $(ls "$INSULA_DATA"/machines)"
if grep -q machine-monitor /proc/[0-9]*/cmdline; then failed "a monitor is left"; fi
leave
shown "a monitor that is killed is seen, a machine that is deleted leaves nothing"
