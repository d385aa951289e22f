# What the bed's scripts share: a host as its operator has it, spoken with by its own verbs, and the
# console of the machine $M. Read by a script that has set $name, the name of its case.
export PATH=/bin:/bed:/usr/sbin:/sbin:/usr/bin HOME=/tmp INSULA_DATA=/tmp/$name.data
rm -f /tmp/keys
mkfifo /tmp/keys
: > /tmp/screen
: > /tmp/serve

failed() {
    tail -n 40 /tmp/serve /tmp/screen /tmp/last
    echo "bed: FAILED $name: $1"
    [ -z "$host" ] || kill -9 "$host"
    exit 1
}

shown() { echo "bed: ok $name: $1"; }

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

# Ends the host in order.
leave() {
    kill "$host"
    wait "$host" || failed "it did not end in order"
}

images() {
    do_it insula image put debian /bed/vmlinuz
    do_it insula image put ramdisk /bed/inner.cpio
    do_it insula image put root /bed/root.ext4
}

# The machine $M, with more arguments.
define() {
    do_it insula machine create $M --kernel debian --initrd ramdisk --disk root:rw --memory 192MiB \
        --cmdline "console=ttyS0 quiet panic=-1 pci=off" "$@"
}

is() { insula machine show $M -o json | tr -d ' ' | grep -q "\"state\":\"$1\""; }

monitor() { insula machine show $M -o json | tr -d ' ' | sed -n 's/.*"monitor_pid":\([0-9]*\).*/\1/p'; }

# Sits down at the console, anew after the machine or the host was gone.
sit_down() {
    exec 3>&-
    if [ -n "$terminal" ]; then
        kill "$terminal" 2> /dev/null
        # Or it would still read what is typed for the next one.
        wait "$terminal"
    fi
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
