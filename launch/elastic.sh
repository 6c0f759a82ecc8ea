#!/bin/sh
# Trains on hosts of which some may die, and others come later. On each of them:
#
#   launch/elastic.sh -n 1:4 -e HOST:PORT [-p PROCESSES] [-r RESTARTS] ARGUMENT...
#   launch/elastic.sh -n 1:4 -e host0:29400 run_dir=/shared/mine elastic=true \
#       data.global_batch_size=256 data.local_batch_size=32 max_steps=10000
#
#   -n MIN:MAX     how many hosts: the job begins, and goes on, when so many are there (1:4)
#   -e HOST:PORT   where they meet, on one of them (localhost:29400)
#   -p PROCESSES   on each (1)
#   -r RESTARTS    how often a host starts its processes again after one has failed (10)
#   -s             only be the place where they meet, on HOST, until it is ended. Else the first
#                  launcher on HOST is, and all ends with it
#   PYTHON         the python that trains (default: the one of setup.sh)
#
# The arguments are those of scaledtrain.train; resume=auto, and unless they say otherwise
# checkpointing=steps, with a copy of every step in the hosts' memory. run_dir is on a disk that all
# hosts see. A host that comes back is started with the same line.
set -eu

usage() {
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

nodes=1:4 endpoint=localhost:29400 processes=1 restarts=10 serve=
while getopts n:e:p:r:s option; do
    case $option in
        n) nodes=$OPTARG ;;
        e) endpoint=$OPTARG ;;
        p) processes=$OPTARG ;;
        r) restarts=$OPTARG ;;
        s) serve=yes ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
case $endpoint in
    *:*) ;;
    *) usage ;;
esac

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-$("$here/setup.sh" examples)}

if [ -n "$serve" ]; then
    exec "$python" -c 'import signal, sys, torch.distributed as dist
store = dist.TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("hosts meet here", flush=True)
signal.pause()' "${endpoint##*:}"
fi

[ $# -ge 1 ] || usage
case " $* " in
    *" checkpointing="*) ;;
    *) set -- checkpointing=steps checkpointing.memory_every_steps=1 "$@" ;;
esac

# Where launchers share one store, those that are left look for that of a host that is gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A host is given up after five seconds of silence, and others are waited for for three; torchrun's
# own numbers are 15 and 30.
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" \
    --max-restarts "$restarts" --monitor-interval 0.5 \
    --rdzv-backend c10d --rdzv-id scaledtrain --rdzv-endpoint "$endpoint" \
    --rdzv-conf keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=3 \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} -m scaledtrain.train "$@" resume=auto
