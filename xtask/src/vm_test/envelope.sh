#!/bin/busybox sh
# In the bed, under cgroup v2: what tenants' limits and shares do to machines that want all they can
# get.
name=envelope
. /bed/lib

# CPU seconds of a tenant so far: its machines' and its services'.
used() { insula usage "$1" -o json | tr -d ' \n' | sed "$2"; }
machines='s/.*"machines":{[^}]*"cpu_seconds":\([0-9.]*\).*/\1/'
services='s/^[^[{]*{[^[{]*"cpu_seconds":\([0-9.]*\).*/\1/'

# Boots $M and keeps its processors busy.
busy() {
    define --vcpus "$1"
    do_it insula machine start $M
    sit_down
    within 200 "init" printed @ready
    for loop in $(seq "$1"); do ask "while :; do :; done & echo loop $loop" "loop $loop"; done
}

# What a quantity grew by, over so many seconds of the clock: before, after, seconds.
rate() { echo "$1 $2 $3" | awk '{ printf "%.3f", ($2 - $1) / $3 }'; }
# Whether a number is within 10 percent of another.
near() { echo "$1 $2" | awk '{ exit !($1 > 0.9 * $2 && $1 < 1.1 * $2) }'; }
now() { cut -d' ' -f1 /proc/uptime; }

serve
images
do_it insula tenants set one --cpu-shares 1000 --memory 512MiB
do_it insula tenants set three --cpu-shares 3000 --memory 512MiB
M=one/only
busy 2
M=three/only
busy 2
sleep 3
one=$(used one "$machines") three=$(used three "$machines")
sleep 20
one=$(rate "$one" "$(used one "$machines")" 1) three=$(rate "$three" "$(used three "$machines")" 1)
ratio=$(echo "$one $three" | awk '{ printf "%.2f", $2 / $1 }')
near "$ratio" 3 || failed "shares of 1:3 are 1:$ratio: $one s and $three s"
shown "shares of 1:3 are 1:$ratio, $one s and $three s of CPU in 20 s"
do_it insula machine delete one/only --force
do_it insula machine delete three/only --force

do_it insula tenants set acme --cpu-limit 500m --memory 512MiB
do_it insula deploy /bed/spin.wasm --tenant acme --service spin
M=acme/first
busy 1
M=acme/second
busy 1
asking() { while :; do wget -q -O /dev/null --header 'Host: spin.acme.localhost' http://127.0.0.1:8080/; done 2> /dev/null; }
asking &
asker=$!
sleep 5
start=$(now) m=$(used acme "$machines") s=$(used acme "$services")
sleep 40
end=$(now) m2=$(used acme "$machines") s2=$(used acme "$services")
kill $asker
seconds=$(echo "$start $end" | awk '{ print $2 - $1 }')
m=$(rate "$m" "$m2" "$seconds") s=$(rate "$s" "$s2" "$seconds")
total=$(echo "$m $s" | awk '{ printf "%.3f", $1 + $2 }')
near "$total" 0.5 || failed "a limit of 500m is $total cores: machines $m, services $s"
echo "$m $s" | awk '{ exit !($1 > 0.02 && $2 > 0.02) }' || failed "one has all: machines $m, services $s"
shown "a limit of 500m is $total cores over $seconds s: two machines $m, a service $s"
do_it insula machine delete acme/first --force
do_it insula machine delete acme/second --force
leave
