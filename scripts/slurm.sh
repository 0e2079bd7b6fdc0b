#!/usr/bin/env bash
# Train on several machines under Slurm.   sbatch --nodes 4 scripts/slurm.sh JOB.toml [--section.key value ...]
#
# One task a machine starts scripts/train.sh there. Slurm warns with SIGUSR1 five minutes before the time limit: the
# job then saves a checkpoint, exits 0, and is put back into the queue, where the same command continues from it.
#SBATCH --job-name=flame
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

flame_root="${FLAME_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export NNODES="$SLURM_NNODES"
export NGPU="${NGPU:-${SLURM_GPUS_ON_NODE:-8}}"

# srun must run in the background: bash handles a signal only when it is not waiting for a foreground command.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0/scripts/train.sh" "$@"' "$flame_root" "$@" &
job=$!

requeue() {
    echo "Time limit is near: saving and going back to the queue."
    scancel --signal=USR1 "$SLURM_JOB_ID"  # without --batch: reaches the tasks, not this script
    wait "$job" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1
wait "$job"
