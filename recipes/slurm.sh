#!/usr/bin/env bash
# Train on SLURM, one process for each GPU, and continue after each time limit.
#
#   sbatch --nodes 2 recipes/slurm.sh pile-157m-rebased --data.path /shared/tokens
#
# The arguments are those of `rebased train`. RUN_DIR names the run's folder, on
# a file system that all nodes share. The first line of #SBATCH that your cluster
# does not know, such as --partition, is yours to change.
#SBATCH --job-name=rebased
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=rebased-%j.log
# Five minutes before the time limit the processes save and end with 138. The
# signal goes to the processes of srun, because it has no "B:".
#SBATCH --signal=USR1@300
set -uo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch recipes/slurm.sh PRESET [--options of rebased train]" >&2
  exit 2
fi
run_dir=${RUN_DIR:-runs/$1-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
most_restarts=${MOST_RESTARTS:-100}

# Each process sees all GPUs of its node, and takes the one of its local number.
# So do not ask for --gpus-per-task. A run that exists is resumed.
srun --kill-on-bad-exit=0 rebased train "$@" \
  --run-dir "$run_dir" --distributed auto
code=$?

# 138: the time limit; 143: preempted. The run is saved. 3 and 4: a process was
# lost, or hung; the last checkpoint is whole. Anything else is not for a retry.
case $code in
  138 | 143 | 3 | 4)
    if [ "$restarts" -lt "$most_restarts" ]; then
      echo "exit code $code after $restarts restarts: again in the queue"
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
