#!/bin/sh
# Compares the strategies on this machine, with four processes: the fastest way to see results.
#
#   launch/quickstart.sh [ARGUMENT...]        the arguments of scaledtrain.compare
#
# The first run installs what is needed: see setup.sh for what it may be told.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$("$here/setup.sh" examples)
# It starts its four workers by torchrun's own machinery; under torchrun it would use what is there.
exec "$python" -m scaledtrain.compare "$@"
