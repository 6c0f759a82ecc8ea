#!/bin/sh
# Compares the strategies on this machine, with four processes: the fastest way to see results.
#
#   launch/quickstart.sh [ARGUMENT...]        the arguments of scaledtrain.compare
#
# The first run installs what is needed: see setup.sh for what it may be told.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$("$here/setup.sh" examples)
export OMP_NUM_THREADS=1 # four processes share the cores: more threads would only get in the way
exec "$python" -m torch.distributed.run --standalone --nproc-per-node 4 -m scaledtrain.compare "$@"
