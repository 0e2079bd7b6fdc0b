"""Tile choices without autotuning at run time: a table shipped per op and GPU, and a safe default for everything else.

``tables/<op>.json`` is written by ``flame doctor --tune`` and holds::

    {"NVIDIA H200": {"forward kind=head D=128 E=128 dtype=bfloat16": {"BT": 64, "BE": 64, "num_warps": 4, ...}}}

``tables/deny.json`` lists configurations known to be miscompiled; they are never chosen, whoever asks::

    [{"op": "...", "capability": "9.0", "triton": ["3.4", "3.7.1"], "match": "key=value ...", "tile": {...}, "why": "..."}]

with ``triton`` a half-open range of versions, ``match`` words that must all stand in the key, and ``tile`` the settings
that must all be equal. A kernel takes its tile as keyword arguments, so a tile is a plain mapping of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from flame.errors import FlameError

Tile = Mapping[str, int]
TABLES = Path(__file__).parent / "tables"

_forced: dict[tuple[str, str], Tile] = {}


def key(name: str, **facts: object) -> str:
    """The text a tile is filed under: the kernel's name, then its facts in the order given."""
    words = [f"{fact}={str(value).removeprefix('torch.')}" for fact, value in facts.items()]
    return " ".join([name, *words])


def choose(op: str, key: str, default: Tile, device: torch.device) -> Tile:
    """The tile for kernel `key` of `op`: forced by `using`, else the shipped table's, else `default`.

    A table entry that is on the deny list for this GPU and Triton is passed over; a denied default is an error, because
    then nothing is left that is known to be right.
    """
    if _forced and (op, key) in _forced:
        return _forced[op, key]
    return _chosen(op, key, tuple(default.items()), device_name(device), capability(device))


@contextmanager
def using(op: str, choices: Mapping[str, Tile]) -> Iterator[None]:
    """Force tiles for some keys of `op`, for tuning and checking."""
    before = dict(_forced)
    _forced.update({(op, name): tile for name, tile in choices.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@lru_cache(maxsize=4096)
def _chosen(op: str, key: str, default: tuple[tuple[str, int], ...], gpu: str, capability: str) -> Tile:
    shipped = shipped_tiles(op, gpu).get(key)
    for tile in (shipped, dict(default)):
        if tile is not None and denied(op, key, tile, capability) is None:
            return tile
    why = denied(op, key, dict(default), capability)
    raise FlameError(
        f"{op}: the only tile for {key!r} on {gpu} is known to be miscompiled ({why}). "
        "Set FLAME_BACKEND=chunked, or another Triton version."
    )


@lru_cache(maxsize=256)
def shipped_tiles(op: str, gpu: str) -> dict[str, Tile]:
    """All entries of one op's table for one GPU."""
    path = TABLES / f"{op}.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text()).get(gpu, {})


def denied(op: str, key: str, tile: Tile, capability: str) -> str | None:
    """Why this tile must not run on this GPU and Triton, or None."""
    words = set(key.split())
    for entry in deny_list():
        if entry["op"] != op or entry["capability"] != capability:
            continue
        if not _version_inside(entry["triton"]) or not set(entry["match"].split()) <= words:
            continue
        if all(tile.get(name) == value for name, value in entry["tile"].items()):
            return entry["why"]
    return None


@lru_cache(maxsize=1)
def deny_list() -> list[dict[str, Any]]:
    path = TABLES / "deny.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_tiles(op: str, gpu: str, tiles: Mapping[str, Tile]) -> Path:
    """Merge new entries into the op's table and return its path."""
    path = TABLES / f"{op}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(gpu, {}).update({name: dict(tile) for name, tile in tiles.items()})
    table[gpu] = dict(sorted(table[gpu].items()))
    path.write_text(json.dumps(table, indent=1, sort_keys=False) + "\n")
    shipped_tiles.cache_clear()
    _chosen.cache_clear()
    return path


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it; 'cpu' where kernels are interpreted."""
    return torch.cuda.get_device_name(_index(device)) if _is_gpu(device) else "cpu"


@lru_cache(maxsize=16)
def capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(_index(device)))) if _is_gpu(device) else "none"


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; an H200's where there is no GPU, so that plans made without one look the same."""
    return torch.cuda.get_device_properties(_index(device)).multi_processor_count if _is_gpu(device) else 132


def _is_gpu(device: torch.device) -> bool:
    """Whether kernels run there; meta tensors stand for tensors of the current GPU."""
    return device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available())


def _index(device: torch.device) -> int | None:
    return device.index if device.type == "cuda" else None


def _version_inside(bounds: list[str]) -> bool:
    import triton

    low, high = (_numbers(text) for text in bounds)
    return low <= _numbers(triton.__version__) < high


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
