"""Forward and gradients for a decay per key channel, and per value channel as the same problem with operands exchanged.

The state of a decay per value channel, transposed, is that of a decay per key channel with (q, k, v) -> (do, v, k):

    q' = do   k' = v   v' = k   do' = q        o' = dq   dq' = o   dk' = dv   dv' = dk

so its forward pass is the half of the other's backward that gives dq', and its backward gives the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention import triton_layout
from flame.kernels.linear_attention.triton_boundary import boundary_states
from flame.kernels.linear_attention.triton_finish import finish
from flame.kernels.linear_attention.triton_layout import (
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    precision,
    strides,
    sum_groups,
)
from flame.kernels.linear_attention.triton_vector import inter_sweep, key_sweep, prepare, strong_scores


@dataclass(frozen=True)
class Prepared:
    """What `prepare` makes of one chunked problem: qs and scores only where the reader (q) is known."""

    rows: int
    qs: Tensor | None
    ks: Tensor
    scores: Tensor | None
    factors: Tensor  # [chunks, H, K] fp32


def default_tile(name: str, K: int, V: int, dtype: torch.dtype) -> tiles.Tile:
    """A tile that compiles everywhere. `prepare` sets the rows of a chunk for the whole call."""
    wide = 2 if dtype == torch.float32 else 1
    summed = power_of_2(K if name == "key" else V) * wide
    if name == "prepare":
        return {
            "BT": 64 if max(K, V) * wide <= 512 else 32,
            "BK": min(64 // wide, power_of_2(K)),
            "num_warps": 4,
            "DOTS": 1 if wide == 1 else 0,
        }
    if name == "finish" and wide == 1:
        return {"BK": min(32, power_of_2(K)), "num_warps": 4, "num_stages": 3, "DOTS": 3}
    if name.startswith("finish"):
        return {"BK": min(32, power_of_2(K)), "num_warps": 8, "DOTS": 0}
    columns = "BV" if name == "key" else "BK"
    width = min(64 if summed <= 256 else 32, power_of_2(V if name == "key" else K))
    stages = 2 if summed <= 128 else 1
    return {columns: width, "num_warps": 8 if summed >= 256 else 4, "num_stages": stages}


@lru_cache(maxsize=1024)
def _tile_key(name: str, K: int, V: int, dtype: torch.dtype) -> tuple[str, tiles.Tile]:
    return tiles.key(name, K=K, V=V, dtype=dtype), default_tile(name, K, V, dtype)


def _tile(name: str, K: int, V: int, x: Tensor) -> tiles.Tile:
    """K and V of the key-decay problem, so exchanged for value_decay."""
    key, default = _tile_key(name, K, V, x.dtype)
    return tiles.choose("linear_attention", key, default, x.device)


def _dot_dtype(x: Tensor) -> torch.dtype:
    """Scaled operands need the range of bf16, which fp16 has not."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def forward(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V], writing the final state into `final`; and the opening states of cut items (exchanged K and V for
    value_decay)."""
    if layout.kind == "key":
        made = prepare_chunks(layout, q, k, decay, bonus, v.shape[-1])
        opening = _opening(layout, made, v, initial, final)
        o = sweep_keys(layout, made, v, initial=initial if opening is None else opening, final=_uncut(layout, final))
        return o, opening
    made = prepare_chunks(layout, None, v, decay, None, k.shape[-1])
    initial, last = (None if x is None else x.mT.contiguous() for x in (initial, final))
    opening = _opening(layout, made, k, initial, last)
    before = initial if opening is None else opening
    dqs, dscores = sweep_inter(layout, made, (q, k), initial=before, final=_uncut(layout, last))
    o, *_ = finish_chunks(layout, made.factors, (None, v), decay, None, (dqs, None, dscores), None)
    if final is not None and last is not None:
        final.copy_(last.mT)
    return o, opening


def _uncut(layout: Layout, final: Tensor | None) -> Tensor | None:
    """The final state is the sweep's to write where no `boundary_states` wrote it."""
    return None if layout.items.cut else final


def _opening(layout: Layout, made: Prepared, v: Tensor, initial: Tensor | None, final: Tensor | None) -> Tensor | None:
    if not layout.items.cut:
        return None
    return boundary_states(layout, made.ks, v, made.factors, rows=made.rows, initial=initial, final=final)


def backward(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor,
    bonus: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    dinitial: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, ddecay and dbonus (None where not wanted); see `triton_scalar_passes.backward`."""
    q, k, v, do = tensors
    if layout.kind == "key":
        _, *gradients = _gradients(layout, tensors, decay, bonus, before, after, dinitial, decay_gradient)
        dq, dk, dv, ddecay, dbonus = gradients
    else:
        # `before` holds opening states with K and V exchanged already when time was cut.
        before = before if before is None or layout.items.cut else before.mT.contiguous()
        after, swapped = (None if x is None else x.mT.contiguous() for x in (after, dinitial))
        exchanged = (do, v, k, q)
        dq, _, dv, dk, ddecay, dbonus = _gradients(
            layout, exchanged, decay, None, before, after, swapped, decay_gradient, output=True
        )
        if dinitial is not None and swapped is not None:
            dinitial.copy_(swapped.mT)
    dq, dk, dv = (sum_groups(d, x.shape[2]) for d, x in ((dq, q), (dk, k), (dv, v)))
    if ddecay is not None:
        ddecay = sum_groups(ddecay, decay.shape[2]).to(decay.dtype)
    return dq, dk, dv, ddecay, dbonus


def _gradients(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor,
    bonus: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    dinitial: Tensor | None,
    decay_gradient: bool,
    output: bool = False,
) -> tuple[Tensor | None, ...]:
    """o when `output`, dq, dk, dv, ddecay, dbonus of the key-decay problem."""
    q, k, v, do = tensors
    made = prepare_chunks(layout, q, k, decay, bonus, v.shape[-1])
    if layout.items.cut:
        after = boundary_states(
            layout, made.qs, do, made.factors, rows=made.rows, reverse=True, initial=after, final=dinitial
        )
        dinitial = None
    o = sweep_keys(layout, made, v, initial=before) if output else None
    anchors = edges = None
    if decay_gradient:
        slots = layout.slots(triton_layout.ANCHOR)
        anchors = made.ks.new_empty(slots, layout.heads, v.shape[-1], k.shape[-1], dtype=torch.float32)
        edges = made.ks.new_empty(slots, layout.heads, k.shape[-1], dtype=torch.float32)
    dqs, dscores = sweep_inter(layout, made, (do, v), initial=before, anchors=anchors)
    dks, _ = sweep_inter(layout, made, (v, do), reverse=True, initial=after, anchors=anchors, edges=edges)
    dv = sweep_keys(layout, made, do, reverse=True, initial=after, final=dinitial)
    factors = made.factors
    del made, anchors  # a third of the peak otherwise
    dq, dk, ddecay, dbonus = finish_chunks(layout, factors, (q, k), decay, bonus, (dqs, dks, dscores), edges)
    return o, dq, dk, dv, ddecay, dbonus


def _chunk_grid(layout: Layout, rows: int) -> int:
    """Programs along time. Lengths of packed items are unknown here, so there each program takes several chunks."""
    count = ceil_div(layout.items.segment, rows)
    return count if layout.items.starts is None else min(count, 16)


def prepare_chunks(
    layout: Layout, q: Tensor | None, k: Tensor, decay: Tensor, bonus: Tensor | None, V: int
) -> Prepared:
    K, H = k.shape[-1], layout.heads
    tile = _tile("prepare", K, V, k)
    rows, dtype = tile["BT"], _dot_dtype(k)
    shape = (layout.batch, layout.tokens, H)
    ks = k.new_empty(*shape, K, dtype=dtype)
    qs = None if q is None else torch.empty_like(ks)
    scores = None if q is None else k.new_empty(*shape, rows, dtype=dtype)
    factors = k.new_empty(layout.slots(rows), H, K, dtype=torch.float32)
    reader = k if q is None else q
    grid = (_chunk_grid(layout, rows), layout.items.count * H)
    common = {
        "q_ptr": reader,
        "k_ptr": k,
        "decay_ptr": decay,
        "bonus_ptr": k if bonus is None else bonus,
        "scores_ptr": ks if scores is None else scores,
        "factor_ptr": factors,
        **item_settings(layout, factors),
        **strides(q=reader, k=k),
        "GROUP_Q": H // reader.shape[2],
        "GROUP_K": H // k.shape[2],
        "GROUP_G": H // layout.decay_heads,
        "K": K,
        "BONUS": bonus is not None,
        "PRECISION": precision(ks),
    }
    prepare[grid](qs_ptr=ks if qs is None else qs, ks_ptr=ks, READERS=q is not None, **common, **tile)
    if q is not None:
        width = tile["BK"]
        grid = (ceil_div(layout.items.segment, 8 * rows), grid[1])
        levels = rows.bit_length() - 1
        strong_scores[grid](**common, BT=rows, BK=width, LEVELS=levels, GROUP=8, num_warps=8, num_stages=1)
    return Prepared(rows, qs, ks, scores, factors)


def sweep_keys(
    layout: Layout,
    made: Prepared,
    c: Tensor,
    *,
    reverse: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """o from v, or in reverse dv from do: [B, T, H, V]."""
    K, V, H = made.ks.shape[-1], c.shape[-1], layout.heads
    tile = _tile("key", K, V, c)
    a, b = (made.ks, made.qs) if reverse else (made.qs, made.ks)
    y = c.new_empty(layout.batch, layout.tokens, H, V)
    key_sweep[(ceil_div(V, tile["BV"]), layout.items.count * H)](
        a_ptr=a,
        b_ptr=b,
        c_ptr=c,
        scores_ptr=made.scores,
        factor_ptr=made.factors,
        y_ptr=y,
        initial_ptr=y if initial is None else initial,
        final_ptr=y if final is None else final,
        scale=layout.scale,
        **item_settings(layout, y),
        **strides(c=c),
        GROUP_C=H // c.shape[2],
        K=K,
        V=V,
        BK=power_of_2(K),
        BT=made.rows,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        PRECISION=precision(made.ks),
        **tile,
    )
    return y


def sweep_inter(
    layout: Layout,
    made: Prepared,
    operands: tuple[Tensor, Tensor],
    *,
    reverse: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    anchors: Tensor | None = None,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of qs through earlier chunks from (do, v), and that of the scores; or in reverse, of ks through later chunks
    from (v, do)."""
    a, b = operands
    K, V, H = made.ks.shape[-1], a.shape[-1], layout.heads
    tile = _tile("inter", K, V, a)
    # fp32: rounded here, their products would not cancel in the suffix sum of the decay's gradient.
    y = torch.empty_like(made.ks, dtype=torch.float32)
    dscores = None if reverse else y.new_empty(layout.batch, layout.tokens, H, made.rows, dtype=made.ks.dtype)
    inter_sweep[(ceil_div(K, tile["BK"]), layout.items.count * H)](
        a_ptr=a,
        b_ptr=b,
        c_ptr=made.qs if reverse else made.ks,
        factor_ptr=made.factors,
        y_ptr=y,
        initial_ptr=y if initial is None else initial,
        final_ptr=y if final is None else final,
        anchor_ptr=y if anchors is None else anchors,
        edge_ptr=y if edges is None else edges,
        dscores_ptr=y if dscores is None else dscores,
        scale=layout.scale,
        **item_settings(layout, y),
        **strides(a=a, b=b),
        GROUP_A=H // a.shape[2],
        GROUP_B=H // b.shape[2],
        K=K,
        V=V,
        BV=power_of_2(V),
        BT=made.rows,
        ANCHOR=triton_layout.ANCHOR,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        DECAY_GRADIENT=anchors is not None,
        PRECISION=precision(made.ks),
        **tile,
    )
    return y, dscores


def finish_chunks(
    layout: Layout,
    factors: Tensor,
    tensors: tuple[Tensor | None, Tensor],
    decay: Tensor,
    bonus: Tensor | None,
    gradients: tuple[Tensor, Tensor | None, Tensor],
    edges: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, ddecay [B, T, H, K] and dbonus [H, K] from the gradients of qs, ks and scores; only dq without that of ks, no
    ddecay without `edges`."""
    q, k = tensors
    dqs, dks, dscores = gradients
    K, H, rows = k.shape[-1], layout.heads, dscores.shape[-1]
    reader = k if q is None else q
    dq = k.new_empty(layout.batch, layout.tokens, H, K)
    dk = None if dks is None else torch.empty_like(dq)
    own = decay.dtype if layout.decay_heads == H else torch.float32
    ddecay = None if edges is None else torch.empty_like(dq, dtype=own)
    # Surplus slots of packed rows are never written, and all slots are summed.
    dbonus = None if bonus is None else k.new_zeros(layout.slots(triton_layout.ANCHOR), H, K, dtype=torch.float32)
    blocks = _chunk_grid(layout, triton_layout.ANCHOR)
    arguments = dict(
        q_ptr=reader,
        k_ptr=k,
        dscores_ptr=dscores,
        decay_ptr=decay,
        bonus_ptr=k if bonus is None else bonus,
        dqs_ptr=dqs,
        dks_ptr=dqs if dks is None else dks,
        factor_ptr=factors,
        edge_ptr=dqs if edges is None else edges,
        dq_ptr=dq,
        dk_ptr=dq if dk is None else dk,
        ddecay_ptr=dq if ddecay is None else ddecay,
        dbonus_ptr=dq if dbonus is None else dbonus,
        **item_settings(layout, dq),
        **strides(q=reader, k=k),
        GROUP_Q=H // reader.shape[2],
        GROUP_K=H // k.shape[2],
        GROUP_G=H // layout.decay_heads,
        K=K,
        BT=rows,
        LEVELS=rows.bit_length() - 1,
        ANCHOR=triton_layout.ANCHOR,
        BONUS=bonus is not None,
        WRITERS=dks is not None,
        DECAY_GRADIENT=edges is not None,
        PRECISION=precision(k),
        DOT=tl.float32 if k.dtype == torch.float32 else tl.bfloat16,
    )
    for strong in (False, True):
        tile = _tile("finish_strong" if strong else "finish", K, 0, k)
        count = ceil_div(blocks, 8) if strong else blocks
        finish[(ceil_div(K, tile["BK"]), count, layout.items.count * H)](**arguments, STRONG=strong, **tile)
    return dq, dk, ddecay, None if dbonus is None or bonus is None else dbonus.sum(0).to(bonus.dtype)
