#!/bin/busybox sh
# In the bed: a machine with a network, a way out into a namespace that stands for the Internet, and
# what it must not reach.
name=wire
. /bed/lib
M=acme/first

$IP link add up0 type veth peer name out0
unshare -n sleep 3000 &
outside=$!
apart() { [ "$(readlink /proc/$outside/ns/net)" != "$(readlink /proc/self/ns/net)" ]; }
within 5 "namespace" apart
out() { nsenter -t $outside -n "$@"; }
$IP link set out0 netns $outside
$IP addr add 8.8.0.1/24 dev up0
$IP link set up0 up
out $IP addr add 8.8.0.2/24 dev out0
out $IP link set out0 up
mkdir /tmp/there /tmp/here
echo from outside > /tmp/there/word
echo from the host > /tmp/here/word
out httpd -h /tmp/there -p 80
httpd -h /tmp/here -p 8000
within 5 "server outside" wget -q -O - http://8.8.0.2/word
within 5 "server here" wget -q -O - http://8.8.0.1:8000/word
before="$(nft list ruleset; cat /proc/sys/net/ipv4/ip_forward)"

serve
insula doctor | grep -q 'ok *machine network' || failed "doctor: $(insula doctor | grep network)"
do_it insula tenants set acme --memory 512MiB
images
define --port 20080:80
do_it insula machine start $M
sit_down
within 200 "init" printed @ready
ask 'set -- $(sed "s/.* ip=\([^ ]*\).*/\1/; s/:/ /g" /proc/cmdline); ip addr add $1/30 dev eth0; ip link set eth0 up; ip route add default via $2; echo "I am $1, $(cat /sys/class/net/eth0/address)"' 'I am 10.199.0.2, 02:49:0a:c7:00:02'
ask 'timeout 9 wget -q -O - http://8.8.0.2/word' 'from outside'
counted() {
    wget -q -O - http://127.0.0.1:8081/metrics | grep 'insula_machine_net_bytes_total{' |
        grep 'machine="first"' | grep 'direction="in"' | grep -q '} [1-9]'
}
within 5 "count of its bytes" counted
shown "a machine that was told its address fetches from outside, and its bytes are counted"

ask 'mkdir -p /tmp/w; echo from the machine > /tmp/w/word; httpd -h /tmp/w -p 80; echo serving' serving
answered() { out timeout 5 wget -q -O - http://8.8.0.1:20080/word | grep -q 'from the machine'; }
within 10 "answer through the port" answered
shown "a port of the host's leads to it from outside"

for to in 10.199.0.1:8000 8.8.0.1:8000 10.199.0.1:8081 8.8.0.1:20080 169.254.169.254:80; do
    ask "timeout 3 wget -q -O - http://$to/word || echo \"not $to\"" "not $to"
done
ask 'ping -c 1 -W 5 8.8.0.2 > /dev/null && echo "as myself"' 'as myself'
ask 'ip addr add 8.8.4.4/32 dev eth0; ping -c 1 -W 3 -I 8.8.4.4 8.8.0.2 > /dev/null || echo "not as 8.8.4.4"' 'not as 8.8.4.4'
shown "it reaches neither the host nor its metadata, and speaks as nobody else"

do_it insula machine snapshot $M
M=acme/second
define --port 20081:80
do_it insula machine restore $M --from first
sit_down
ask 'cd /sys/bus/virtio/drivers/virtio_net; D=$(basename $(readlink /sys/class/net/eth0/device)); echo $D > unbind; echo $D > bind; echo "I am $(cat /sys/class/net/eth0/address)"' 'I am 02:49:0a:c7:00:06'
ask 'ip addr add 10.199.0.6/30 dev eth0; ip link set eth0 up; ip route add default via 10.199.0.5; wget -q -O - http://8.8.0.2/word' 'from outside'
ask 'timeout 3 wget -q -O - http://10.199.0.2/word || echo "not the first"' 'not the first'
M=acme/first
sit_down
ask 'rm -f word; wget -q -O word http://8.8.0.2/word && echo "still $(cat word)"' 'still from outside'
shown "a clone takes the address of its own, and the two see nothing of each other"

kill -9 "$(monitor)"
within 1 "failure" is failed
if ls /proc/sys/net/ipv4/conf | grep -q '^ins.*-0$'; then failed "its interface stays"; fi
do_it insula machine delete $M
do_it insula machine delete acme/second --force
after="$(nft list ruleset; cat /proc/sys/net/ipv4/ip_forward)"
[ "$after" = "$before" ] || failed "left: $after"
if ls /proc/sys/net/ipv4/conf | grep -q '^ins'; then failed "an interface is left"; fi
do_it insula tenants delete acme
leave
kill $outside
shown "a monitor that is killed takes its interface along, and nothing is left"
