#!/bin/sh
# Trains under Slurm, one task on each GPU (or --ntasks), and queues itself again before its time is over.
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh [ARGUMENT...]
#
# The arguments are those of scaledtrain.train; checkpointing=minutes unless they name another one.
# The folder of the run is runs/slurm-<job>, on a disk that all nodes see, unless RUN_DIR says so.
# Two minutes before the end Slurm sends SIGUSR1: the run is saved, its tasks end with exit code 75,
# and the job is queued again, to go on where it was. A node that fails does the same (--requeue).
#SBATCH --job-name=scaledtrain
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}
case " $* " in
*" checkpointing="*) ;;
*) set -- checkpointing=minutes "$@" ;;
esac

code=0
# --kill-on-bad-exit=0: that one task has ended does not end those that still save.
srun --kill-on-bad-exit=0 "${PYTHON:-python}" -m scaledtrain.train "$@" \
    "run_dir=$run_dir" resume=auto || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
