#!/usr/bin/env bash
# Lint, type-check and test.   bash scripts/test.sh [pytest arguments]
# FLAME_TEST_ALL=1 also runs the slow tests. FLAME_GOLDEN_DIR names a folder of golden cases; without it they skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh dev

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m ruff check .
python -m mypy
arguments=("$@")
[ "${FLAME_TEST_ALL:-0}" = 1 ] && arguments+=(--run-slow)
python -m pytest -q -n "${FLAME_TEST_WORKERS:-2}" "${arguments[@]}"
