# Sourced by the scripts beside it. Leaves `python` pointing at an interpreter that has everything flame needs:
# the active one if it does, else .venv, which is made and filled from pyproject.toml under constraints.txt.
# What a job needs only sometimes (datasets, tensorboard, W&B) is not looked for here: its absence has its own message.
# Usage: source scripts/environment.sh EXTRA        EXTRA: "" (training) or "dev" (tests, linters); bash would pass the
# arguments of the sourcing script if there were none

flame_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
flame_extra="${1:-}"

# True when interpreter $1 has the packages; asks the import system where they are and imports none of them (0.1 s).
flame_has_packages() {
    "$1" - "$flame_extra" <<'PY' 2>/dev/null
import importlib.metadata as metadata, importlib.util as util, sys
need = ["torch", "numpy", "safetensors", "tokenizers"]
need += ["tomli"] if sys.version_info < (3, 11) else []
need += ["pytest", "xdist", "ruff", "mypy", "transformers"] if sys.argv[1] == "dev" else []
missing = [name for name in need if util.find_spec(name) is None]
version = tuple(int(part) for part in metadata.version("torch").split("+")[0].split(".")[:2])
sys.exit(bool(missing) or sys.version_info < (3, 10) or version < (2, 11))
PY
}

flame_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            command -v "$candidate"
            return
        fi
    done
    echo "flame needs Python 3.10 or newer and found none on PATH." >&2
    return 1
}

flame_setup() {
    local base venv="$flame_root/.venv"
    base="$(flame_python)" || return 1
    if flame_has_packages "$base"; then
        flame_bin="$(dirname "$base")"
    else
        if ! { [ -x "$venv/bin/python" ] && flame_has_packages "$venv/bin/python"; }; then
            echo "Setting up $venv (once)" >&2
            "$base" -m venv "$venv" || return 1
            # torch first and alone: its exact pin decides which build every later package resolves against.
            "$venv/bin/python" -m pip install -q -c "$flame_root/constraints.txt" torch || return 1
            "$venv/bin/python" -m pip install -q -c "$flame_root/constraints.txt" \
                -e "$flame_root${flame_extra:+[$flame_extra]}" || return 1
        fi
        flame_bin="$venv/bin"
        export PATH="$flame_bin:$PATH"
    fi
    python() { "$flame_bin/python3" "$@"; }
    export PYTHONPATH="$flame_root${PYTHONPATH:+:$PYTHONPATH}"
}

flame_setup || { echo "Could not prepare a Python environment; see the messages above." >&2; exit 1; }
