#!/bin/sh
# Several hosts on this one, to try out what goes over a network: namespaces for each, joined by a
# switch of limited bandwidth. On each torchrun starts processes, which meet by its rendezvous. Needs
# Linux, root, iproute2 and util-linux.
#
#   launch/hosts.sh [-n HOSTS] [-p PROCESSES] [-b BANDWIDTH] MODULE [ARGUMENT...]
#   launch/hosts.sh -n 2 -p 1 -b 100mbit scaledtrain.train strategy=diloco max_steps=200
#
#   -n HOSTS       how many (2)
#   -p PROCESSES   on each (1)
#   -b BANDWIDTH   of each host's card, in and out, as tc has it: 100mbit, 10gbit (1gbit)
#   PYTHON         the python that runs the module (default: the one of setup.sh)
set -eu

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

hosts=2 processes=1 bandwidth=1gbit
while getopts n:p:b: option; do
    case $option in
        n) hosts=$OPTARG ;;
        p) processes=$OPTARG ;;
        b) bandwidth=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
case $hosts$processes in
    *[!0-9]*) usage ;;
esac

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-$("$here/setup.sh" examples)}
names=$(mktemp) # of all hosts, instead of /etc/hosts
name=st$$ # of the namespaces and cards: several jobs may run at once
net=10.$((64 + $$ / 250 % 64)).$(($$ % 250))

# shellcheck disable=SC2329 # the traps call it
clean() {
    trap - EXIT INT TERM
    # shellcheck disable=SC2046 # one word for each process
    kill $(jobs -p) 2>/dev/null || true
    wait || true
    host=0
    while [ "$host" -lt "$hosts" ]; do
        ip netns delete "$name-$host" 2>/dev/null || true
        host=$((host + 1))
    done
    ip netns delete "$name-switch" 2>/dev/null || true
    rm -f -- "$names"
}
trap clean EXIT
trap 'clean; exit 130' INT
trap 'clean; exit 143' TERM

echo 127.0.0.1 localhost >"$names"
ip netns add "$name-switch"
ip -n "$name-switch" link add switch type bridge
ip -n "$name-switch" link set switch up

host=0
while [ "$host" -lt "$hosts" ]; do
    ip netns add "$name-$host"
    ip -n "$name-$host" link set lo up
    ip -n "$name-$host" link add card0 type veth peer name "port$host" netns "$name-switch"
    ip -n "$name-$host" address add "$net.$((host + 1))/24" dev card0
    ip -n "$name-$host" link set card0 up
    ip -n "$name-switch" link set "port$host" master switch up
    tc -n "$name-$host" qdisc add dev card0 root tbf rate "$bandwidth" burst 256kb latency 50ms
    tc -n "$name-switch" qdisc add dev "port$host" root \
        tbf rate "$bandwidth" burst 256kb latency 50ms
    echo "$net.$((host + 1)) host$host" >>"$names"
    host=$((host + 1))
done

run_on() { # HOST MODULE [ARGUMENT...]
    host=$1
    shift
    # A name, processes and /dev/shm of its own, so that nothing takes two hosts for one.
    # shellcheck disable=SC2016 # the inner shell expands it
    exec ip netns exec "$name-$host" unshare --mount --uts --ipc --pid --fork --kill-child \
        --mount-proc sh -c '
        mount -t tmpfs tmpfs /dev/shm && mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 &&
            exec "$@"' sh "$names" "host$host" \
        env GLOO_SOCKET_IFNAME=card0 NCCL_SOCKET_IFNAME=card0 TP_SOCKET_IFNAME=card0 \
        "$python" -m torch.distributed.run --nnodes "$hosts" --nproc-per-node "$processes" \
        --rdzv-backend c10d --rdzv-id "$name" --rdzv-endpoint "$net.1:29500" \
        --local-addr "$net.$((host + 1))" -m "$@"
}

pids=
host=0
while [ "$host" -lt "$hosts" ]; do
    run_on "$host" "$@" &
    pids="$pids $!"
    host=$((host + 1))
done
code=0
for pid in $pids; do
    wait "$pid" || code=$?
done
exit "$code"
