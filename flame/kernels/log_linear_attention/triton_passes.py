"""Forward and gradients as a few kernels over chunks and the tree of chunks (`triton_tree`).

The states of the tree take as much memory as one state a chunk. They are made anew in the backward pass, and their gradients
then overwrite them, so that only one such buffer exists at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention.triton_layout import ceil_div, power_of_2, precision, strides, sum_groups
from flame.kernels.log_linear_attention.triton_chunks import (
    decay_gradients,
    key_gradients,
    outputs,
    query_gradients,
)
from flame.kernels.log_linear_attention.triton_layout import RUN, Layout, blocks, settings
from flame.kernels.log_linear_attention.triton_nodes import merge_runs, node_gradients, node_states
from flame.kernels.log_linear_attention.triton_tree import decay_sums, decay_tree


@dataclass(frozen=True)
class Decays:
    """sums [chunks, H, CHUNK] within chunks and totals [2 chunks, H] of the tree's nodes, fp32 in base 2."""

    sums: Tensor
    totals: Tensor


def forward_pass(layout: Layout, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor) -> Tensor:
    """o [B, T, H, V]."""
    decays = sum_decays(layout, decay)
    states = make_states(layout, k, v, decays)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = _tile("outputs", layout, q)
    sizes = blocks(layout) | {"BV": min(tile["BV"], power_of_2(layout.V))}
    outputs[(layout.chunks, layout.heads, ceil_div(layout.V, sizes["BV"]))](
        q, k, v, weights, decays.sums, decays.totals, states, o, **_common(layout, o, q=q, k=k, v=v),
        **settings(layout, o), **_groups(layout, q=q, k=k), **sizes, INSIDE=layout.inside, PRECISION=precision(q),
        **_launch(tile),
    )  # fmt: skip
    return o


def backward_pass(
    layout: Layout, tensors: tuple[Tensor, ...], weights: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weights and decay; tensors: q, k, v, do."""
    q, k, v, do = tensors
    decays = sum_decays(layout, decay)
    nodes = make_states(layout, k, v, decays)
    rows = (layout.batch, layout.tokens, layout.heads)
    across = torch.empty_like(decays.sums)
    flux = across.new_empty(max(1, layout.depth), layout.heads, layout.chunks)
    dweights = torch.zeros(weights.shape, dtype=torch.float32, device=v.device)
    common = _common(layout, do, q=q, k=k, v=v, o=do)
    common |= {"chunks": layout.chunks, **settings(layout, do), **_groups(layout, q=q, k=k), **blocks(layout)}
    common |= {"INSIDE": layout.inside, "PRECISION": precision(q)}
    operands = (q, k, v, do, weights, decays.sums, decays.totals, nodes)
    grid = (layout.chunks, layout.heads)
    dq = q.new_empty(*rows, layout.K)
    query_gradients[grid](*operands, dq, dweights, across, flux, **common, **_launch(_tile("queries", layout, q)))
    dq = sum_groups(dq, q.shape[2])
    make_gradients(layout, q, do, weights, decays, nodes)
    dk, dv = k.new_empty(*rows, layout.K), v.new_empty(v.shape)
    key_gradients[grid](*operands, dk, dv, across, flux, **common, **_launch(_tile("keys", layout, q)))
    dk = sum_groups(dk, k.shape[2])
    ddecay = torch.empty_like(decay)
    decay_gradients[grid](
        across, flux, ddecay, depth=layout.depth, chunks=layout.chunks, **settings(layout, do), BLOCK=128, num_warps=2
    )
    return dq, dk, dv, dweights.to(weights.dtype), ddecay


def sum_decays(layout: Layout, decay: Tensor) -> Decays:
    where = settings(layout, decay)
    sums = decay.new_empty(layout.chunks, layout.heads, where["BT"], dtype=torch.float32)
    totals = decay.new_empty(2 * layout.chunks, layout.heads, dtype=torch.float32)
    width = min(16, power_of_2(layout.heads))
    groups = ceil_div(layout.heads, width)
    decay_sums[(layout.chunks, groups)](decay, sums, totals, **where, BH=width, num_warps=4)
    if layout.depth > 0:
        decay_tree[(layout.trees, groups)](totals, **_forest(layout, totals), BH=width, BN=32, num_warps=4)
    return Decays(sums, totals)


def make_states(layout: Layout, k: Tensor, v: Tensor, decays: Decays) -> Tensor:
    """[chunks, H, K, V] in k's dtype: the state of every node with an even index, in the slot of its last chunk."""
    H, K, V = layout.heads, layout.K, layout.V
    states = k.new_empty(layout.chunks, H, K, V)
    tile = _tile("states", layout, k)
    sizes = _cut(layout, tile)
    runs = layout.chunks if layout.table is not None else layout.batch * ceil_div(layout.per_row, RUN)
    node_states[(runs, H, _cells(sizes))](
        k, v, decays.sums, decays.totals, states, **settings(layout, k), **strides(k=k, v=v),
        **_groups(layout, k=k), **sizes, RUN=RUN, LEVELS=RUN.bit_length() - 1, PRECISION=precision(k), **_launch(tile),
    )  # fmt: skip
    if 1 << layout.depth > 2 * RUN:
        block = min(2048, power_of_2(K * V))
        merge_runs[(layout.trees * H, ceil_div(K * V, block))](
            states, decays.totals, **_forest(layout, states), CELLS=K * V, BLOCK=block, RUN=RUN, num_warps=4
        )
    return states


def make_gradients(layout: Layout, q: Tensor, do: Tensor, weights: Tensor, decays: Decays, nodes: Tensor) -> None:
    """Overwrite `nodes` with the gradients of the nodes' states."""
    if layout.depth == 0:
        return
    tile = _tile("nodes", layout, q)
    sizes = _cut(layout, tile)
    dense = layout.order is None
    order = q if layout.order is None else layout.order
    programs = layout.batch * ((1 << layout.depth) - 1) if dense else layout.chunks
    node_gradients[(_cells(sizes) * layout.heads * programs,)](
        q, do, weights, decays.sums, decays.totals, nodes, order_ptr=order, batch=layout.batch, depth=layout.depth,
        **_common(layout, do, q=q, o=do), **settings(layout, do), **_groups(layout, q=q), **sizes,
        INSIDE=layout.inside, PRECISION=precision(q), **_launch(tile),
    )  # fmt: skip


def _forest(layout: Layout, nothing: Tensor) -> dict[str, object]:
    documents = layout.documents
    return {
        "documents_ptr": nothing if documents is None else documents,
        "per_row": layout.per_row,
        "H": layout.heads,
        "VARLEN": documents is not None,
    }


def _common(layout: Layout, nothing: Tensor, **tensors: Tensor) -> dict[str, object]:
    return {"scale": layout.scale, "L": layout.levels, **strides(**tensors)}


def _groups(layout: Layout, **tensors: Tensor) -> dict[str, int]:
    return {f"GROUP_{name.upper()}": layout.heads // x.shape[2] for name, x in tensors.items()}


def _cut(layout: Layout, tile: tiles.Tile) -> dict[str, int]:
    sizes = blocks(layout)
    return sizes | {"BK": min(tile["BK"], sizes["BK"]), "BV": min(tile["BV"], sizes["BV"])}


def _cells(sizes: dict[str, int]) -> int:
    return ceil_div(sizes["K"], sizes["BK"]) * ceil_div(sizes["V"], sizes["BV"])


def _launch(tile: tiles.Tile) -> dict[str, int]:
    return {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}


_DEFAULTS: dict[str, tiles.Tile] = {
    "outputs": {"BV": 128, "num_warps": 8, "num_stages": 2},
    "states": {"BK": 128, "BV": 64, "num_warps": 4, "num_stages": 2},
    "nodes": {"BK": 128, "BV": 64, "num_warps": 4, "num_stages": 3},
    "queries": {"num_warps": 8, "num_stages": 2},
    "keys": {"num_warps": 8, "num_stages": 2},
}


def default_tile(name: str, dtype: torch.dtype) -> tiles.Tile:
    tile = dict(_DEFAULTS[name])
    if dtype == torch.float32:
        tile |= {side: tile[side] // 2 for side in ("BK", "BV") if side in tile} | {"num_stages": 1, "num_warps": 8}
    return tile


@lru_cache(maxsize=1024)
def tile_key(name: str, K: int, V: int, dtype: torch.dtype) -> str:
    return tiles.key(name, K=K, V=V, dtype=dtype)


def _tile(name: str, layout: Layout, x: Tensor) -> tiles.Tile:
    key = tile_key(name, layout.K, layout.V, x.dtype)
    return tiles.choose("log_linear_attention", key, default_tile(name, x.dtype), x.device)
