#!/bin/busybox sh
# In the bed: a host as its operator has it, spoken with by its own verbs, and a machine of a tenant's
# with the distribution's kernel. Prints a line for each thing that is shown.
export PATH=/bin:/bed HOME=/tmp INSULA_DATA=/tmp/data
M=acme/first
mkfifo /tmp/keys
: > /tmp/screen

failed() {
    tail -n 40 /tmp/serve /tmp/screen /tmp/last
    echo "bed: FAILED the host: $1"
    [ -z "$host" ] || kill -9 "$host"
    exit 1
}

shown() { echo "bed: ok the host: $1"; }

# A command that succeeds.
do_it() { "$@" > /tmp/last 2>&1 || failed "$*"; }

# So many seconds, for what, and the command that succeeds then.
within() {
    turns=$(($1 * 5))
    what=$2
    shift 2
    until "$@" > /tmp/last 2>&1; do
        turns=$((turns - 1))
        [ $turns -gt 0 ] || failed "no $what in time"
        sleep 0.2
    done
}

serve() {
    insula serve --workers 1 --instances 10 >> /tmp/serve 2>&1 &
    host=$!
    within 100 "host" insula tenants list
}

is() { insula machine show $M -o json | tr -d ' ' | grep -q "\"state\":\"$1\""; }

monitor() { insula machine show $M -o json | tr -d ' ' | sed -n 's/.*"monitor_pid":\([0-9]*\).*/\1/p'; }

# Sits down at the console, anew after the machine or the host was gone.
sit_down() {
    exec 3>&-
    [ -z "$terminal" ] || kill "$terminal" 2> /dev/null
    insula machine console $M < /tmp/keys > /tmp/screen 2>&1 &
    terminal=$!
    exec 3> /tmp/keys
}

printed() { grep -q "$1" /tmp/screen; }

# Types a line, which is not echoed, and waits for the answer.
ask() {
    echo "$1" >&3
    within 100 "answer to '$1'" printed "$2"
}

serve
do_it insula tenants set acme --cpu-limit 1500m --memory 512MiB
do_it insula image put debian /bed/vmlinuz
do_it insula image put ramdisk /bed/inner.cpio
do_it insula image put root /bed/root.ext4
define() {
    do_it insula machine create $M --kernel debian --initrd ramdisk --disk root:rw --vcpus 2 \
        --memory 192MiB --cmdline "console=ttyS0 quiet panic=-1 pci=off"
}
define
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
define
do_it insula machine restore $M --from first
sit_down
ask 'echo two > /kept; sync; echo "a clone since $(cut -d. -f1 /proc/uptime)"' 'a clone since'
do_it insula machine delete $M --force
M=acme/first
sit_down
ask 'echo 3 > /proc/sys/vm/drop_caches; echo "still: $(cat /kept)"' 'still: kept'
before=$(monitor)
shown "a snapshot, gone on with from where it was, and a clone of it beside"

echo 'reboot -f' >&3
within 30 "new monitor" eval '[ -n "$(monitor)" ] && [ "$(monitor)" != "$before" ]'
sit_down
within 200 "init after the reboot" printed @ready
ask 'echo "it $(cat /kept)"' 'it kept'
shown "a guest that reboots goes on with its disk"

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
[ -z "$(ls /tmp/data/machines)" ] || failed "files are left: $(ls /tmp/data/machines)"
if grep -q machine-monitor /proc/[0-9]*/cmdline; then failed "a monitor is left"; fi
kill "$host"
wait "$host" || failed "it did not end in order"
shown "a monitor that is killed is seen, a machine that is deleted leaves nothing"
