#!/usr/bin/env bash
# Train.   bash scripts/train.sh JOB.toml [--section.key value ...]
#
# NGPU         processes on this machine; default: its GPUs, or 1 without any
# NNODES       machines; default 1. With more, also NODE_RANK, MASTER_ADDR and MASTER_PORT
# LOG_RANK     ranks whose output is shown, e.g. 0,1; default 0
# MAX_RESTARTS restarts after a worker died; each continues from the latest checkpoint; default 0
#
# SIGTERM or SIGUSR1 to this script saves a checkpoint and ends with status 0; the same command then continues.
set -euo pipefail
flame_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$flame_root/scripts/environment.sh" ""  # without an argument it would take those of this script

if [ $# -eq 0 ]; then
    echo "usage: bash scripts/train.sh JOB.toml [--section.key value ...]" >&2
    exit 2
fi

gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
NGPU="${NGPU:-$([ "${gpus:-0}" -gt 0 ] && echo "$gpus" || echo 1)}"
NNODES="${NNODES:-1}"
# Several processes on the cores of one machine slow each other down unless each gets its share.
share=$(($(nproc 2>/dev/null || echo 1) / NGPU))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 8 ? 8 : share))}"
if [ "${gpus:-0}" -eq 0 ]; then
    # FSDP frees and allocates large blocks all the time. By default glibc hands each of them back to the kernel, which
    # clears it again page by page: a third of a small model's CPU time.
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
fi
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Starting, torchrun imports torch for itself: seconds that a single process that nobody restarts need not wait.
if [ "$NGPU" = 1 ] && [ "$NNODES" = 1 ] && [ "${MAX_RESTARTS:-0}" = 0 ]; then
    unset RANK WORLD_SIZE LOCAL_RANK
    exec "$flame_bin/python3" -m flame.train "$@"
fi

launch=(--nproc-per-node "$NGPU" --max-restarts "${MAX_RESTARTS:-0}")
launch+=(--role rank --tee 3 --local-ranks-filter "${LOG_RANK:-0}")
if [ "$NNODES" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    launch+=(--standalone)
else
    launch+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}")
    launch+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi

"$flame_bin/python3" -m torch.distributed.run "${launch[@]}" -m flame.train "$@" &
launcher=$!

# Signals go to the workers and not to torchrun, which would report a failure although they saved and ended well.
forward() {
    local workers
    workers="$(cat /proc/$launcher/task/*/children 2>/dev/null || true)"
    # shellcheck disable=SC2086
    kill -s "$1" ${workers:-$launcher} 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward USR1' USR1
trap 'forward INT' INT

# wait returns early when a signal arrives; only the end of the launcher counts.
status=0
while kill -0 "$launcher" 2>/dev/null; do
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
