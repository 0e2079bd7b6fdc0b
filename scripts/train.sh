#!/usr/bin/env bash
# Train.   bash scripts/train.sh JOB.toml [--section.key value ...]
#
# NGPU         processes on this machine; default: its GPUs, or 1 without any
# NNODES       machines; default 1. With more, also NODE_RANK (or a scheduler's), MASTER_ADDR and MASTER_PORT
# LOG_RANK     ranks whose output is shown, e.g. 0,1; default 0
# MAX_RESTARTS restarts after a worker died; each continues from the latest checkpoint; default 0
set -euo pipefail
flame_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$flame_root/scripts/environment.sh"

if [ $# -eq 0 ]; then
    echo "usage: bash scripts/train.sh JOB.toml [--section.key value ...]" >&2
    exit 2
fi

gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
NGPU="${NGPU:-$([ "${gpus:-0}" -gt 0 ] && echo "$gpus" || echo 1)}"
NNODES="${NNODES:-1}"
# Several processes on the cores of one machine slow each other down unless each gets its share.
cores="$(nproc 2>/dev/null || echo 1)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / NGPU > 0 ? (cores / NGPU > 8 ? 8 : cores / NGPU) : 1))}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

launch=(--nproc-per-node "$NGPU" --max-restarts "${MAX_RESTARTS:-0}" --local-ranks-filter "${LOG_RANK:-0}")
# torchrun passes these on to the workers, which save a checkpoint and exit.
launch+=(--role rank --tee 3 --signals-to-handle SIGTERM,SIGINT,SIGUSR1)
if [ "$NNODES" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    launch+=(--standalone)
else
    launch+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}")
    launch+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$flame_bin/python3" -m torch.distributed.run "${launch[@]}" -m flame.train "$@"
