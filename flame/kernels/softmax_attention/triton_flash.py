"""The tiled kernels as operators of torch: gates, sinks, windows, grouped heads, packed documents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels import tiles
from flame.kernels.compile_together import compiled_together
from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2
from flame.kernels.softmax_attention import gates, triton_gates
from flame.kernels.softmax_attention.gates import boundaries
from flame.kernels.softmax_attention.triton_backward import attention_dkv, attention_dq
from flame.kernels.softmax_attention.triton_forward import attention_forward
from flame.kernels.softmax_attention.triton_pruning import first_keys, last_rows, threshold

LOG2E = math.log2(math.e)
EXACT = (32, 32, 4, 1)
# BM, BN, warps, stages by head size; up to 128 the fastest of seven on an H200 with Triton 3.6, [2, 8192, 16, D] with gates.
TILES = {
    ("forward", "narrow"): (128, 64, 4, 3),
    ("forward", "middle"): (128, 64, 4, 2),
    ("forward", "wide"): (64, 64, 8, 1),
    ("dq", "narrow"): (128, 64, 4, 2),
    ("dq", "middle"): (64, 64, 4, 2),
    ("dq", "wide"): (64, 64, 8, 1),
    ("dkv", "narrow"): (64, 64, 4, 2),
    ("dkv", "middle"): (64, 128, 8, 2),
    ("dkv", "wide"): (64, 64, 8, 1),
}


def as_rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that batch and time are one axis and D is dense; a copy only where they are not."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if rows and x.stride(-1) == 1 and x.stride(1) > 0 else x.contiguous()


def sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    K, V = q.shape[3], v.shape[3]
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    sizes = {
        "H": q.shape[2],
        "Hk": k.shape[2],
        "K": K,
        "V": V,
        "BK": max(16, power_of_2(K)),
        "BV": max(16, power_of_2(V)),
    }
    return {**sizes, "PRECISION": precision}


def pick_tile(kernel: str, q: Tensor, v: Tensor, gated: bool) -> dict[str, int]:
    """The tile of one kernel, no taller than q."""
    largest = max(q.shape[3], v.shape[3])
    width = "narrow" if largest <= 64 else "middle" if largest <= 128 else "wide"
    row = EXACT if q.dtype == torch.float32 else TILES[kernel, width]
    default = dict(zip(("BM", "BN", "num_warps", "num_stages"), row))
    name = tiles.key(kernel, K=q.shape[3], V=v.shape[3], dtype=q.dtype, gated=int(gated))
    chosen = dict(tiles.choose("softmax_attention", name, default, q.device))
    return {**chosen, "BM": min(chosen["BM"], max(16, power_of_2(q.shape[1])))}


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    q, k, v, _, sink, cu_seqlens, scale, window, _ = inputs
    _gradients(outputs[0], q, k, v, sink, cu_seqlens, *outputs, scale, window)


@compiled_together(_then)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor | None,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, Tq, H, V]; lse [B, H, Tq] base 2; the gates' sums and the pruning bounds, empty where there are none."""
    q, k, v = as_rows(q), as_rows(k), as_rows(v)
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    tile = pick_tile("forward", q, v, log_forget is not None)
    o, lse = q.new_empty(B, Tq, H, v.shape[3]), q.new_empty(B, H, Tq, dtype=torch.float32)
    sums = q.new_empty(0, dtype=torch.float32) if log_forget is None else triton_gates.running_sums(log_forget)
    prune = log_forget is not None and share > 0
    bound = threshold(q, k, scale, share) if prune else q.new_empty(0, dtype=torch.float32)
    start = first_keys(sums, bound, Tq, tile["BM"], tile["BN"]) if prune else None
    begin = None if cu_seqlens is None else boundaries(cu_seqlens, Tk)[0]
    count = cdiv(Tq, tile["BM"])
    attention_forward[(count * B * H,)](
        q, k, v, o, lse, sums, None if sink is None else sink.float(), begin, start,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        Tq, Tk, count, B * H * Tk, scale * LOG2E, **sizes(q, k, v),
        GATED=log_forget is not None, SINK=sink is not None, CAUSAL=True, WINDOW=window,
        PACKED=cu_seqlens is not None, PRUNE=prune, **tile,
    )  # fmt: skip
    return o, lse, sums, bound


_attention = torch.library.custom_op("flame::tiled_attention", _forward, mutates_args=())


@_attention.register_fake
def _(q, k, v, log_forget, sink, cu_seqlens, scale, window, share):
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    gated = log_forget is not None
    return (
        q.new_empty(B, Tq, H, v.shape[3]),
        q.new_empty(B, H, Tq, dtype=torch.float32),
        q.new_empty((2, B, H, Tk) if gated else (0,), dtype=torch.float32),
        q.new_empty((B, H) if gated and share > 0 else (0,), dtype=torch.float32),
    )


def _gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    sums: Tensor,
    bound: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and d log_forget and dsink (empty where there are none)."""
    q, k, v, do = as_rows(q), as_rows(k), as_rows(v), as_rows(do.to(q.dtype))
    (B, Tq, H, _), (Tk, Hk) = q.shape, k.shape[1:3]
    gated, prune = sums.numel() > 0, bound.numel() > 0
    rows, keys = (pick_tile(name, q, v, gated) for name in ("dq", "dkv"))
    start = first_keys(sums, bound, Tq, rows["BM"], rows["BN"]) if prune else None
    stop = last_rows(sums, bound, Tq, keys["BM"], keys["BN"]) if prune else None
    begin, end = (None, None) if cu_seqlens is None else boundaries(cu_seqlens, Tk)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    row_total = torch.empty_like(lse) if gated else None
    column_total = lse.new_empty(B, H, Tk) if gated else None
    strides = [x.stride(axis) for x in (q, k, v, do) for axis in (1, 2)]
    numbers = (B * H * Tk, scale * LOG2E, scale)
    flags = {"GATED": gated, "CAUSAL": True, "WINDOW": window, "PACKED": cu_seqlens is not None, "PRUNE": prune}
    flags |= sizes(q, k, v)
    count = cdiv(Tq, rows["BM"])
    attention_dq[(count * B * H,)](
        q, k, v, o, do, lse, delta, dq, row_total, sums, begin, start,
        *strides, Tq, Tk, count, *numbers, **flags, **rows,
    )  # fmt: skip
    count = cdiv(Tk, keys["BN"])
    attention_dkv[(count * B * Hk,)](
        q, k, v, do, lse, delta, dk, dv, column_total, sums, begin, end, stop,
        *strides, Tq, Tk, count, *numbers, **flags, **keys,
    )  # fmt: skip
    nothing = lse.new_empty(0)
    dforget = nothing
    if row_total is not None and column_total is not None:
        dforget = _gate_gradient(row_total, column_total, cu_seqlens)
    dsink = nothing if sink is None else _sink_gradient(sink, lse, delta)
    return dq, dk, dv, dforget, dsink


def _gate_gradient(rows: Tensor, columns: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """d log_forget `[B, Tk, H]` from the row and column sums of dS."""
    if cu_seqlens is None:
        return triton_gates.gate_gradient(rows, columns)
    dtotal = columns.neg_()
    dtotal[..., columns.shape[2] - rows.shape[2] :] += rows
    return gates.gate_gradient(dtotal, cu_seqlens)


def _sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink's weight times how far a value of zero falls short of the output, over all queries: [H]."""
    weight = torch.exp2(sink.float()[:, None] * LOG2E - lse)
    return -(weight * delta).sum((0, 2)).to(sink.dtype)


_attention_backward = torch.library.custom_op("flame::tiled_attention_backward", _gradients, mutates_args=())


@_attention_backward.register_fake
def _(do, q, k, v, sink, cu_seqlens, o, lse, sums, bound, scale, window):
    nothing = lse.new_empty(0)
    dforget = lse.new_empty(q.shape[0], k.shape[1], q.shape[2]) if sums.numel() else nothing
    dsink = nothing if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dforget, dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_forget, sink, cu_seqlens, ctx.scale, ctx.window, _ = inputs
    ctx.save_for_backward(q, k, v, sink, cu_seqlens, *output)
    ctx.gate_dtype = None if log_forget is None else log_forget.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: checkpointing gives them out a single time
    dq, dk, dv, dforget, dsink = attention_backward(do, *saved, ctx.scale, ctx.window)
    dforget = None if ctx.gate_dtype is None else dforget.to(ctx.gate_dtype)
    return dq, dk, dv, dforget, None if saved[3] is None else dsink, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)
attention_backward = Direct(_attention_backward, _gradients)
attention = Direct(_attention, _forward, _save, _backward)


def _flops(q_shape, k_shape, v_shape) -> int:
    """Scores and weighted values of the lower triangle."""
    (B, Tq, H, K), Tk = q_shape, k_shape[1]
    return B * H * Tq * (2 * Tk - Tq + 1) * (K + v_shape[3])


@register_flop_formula(torch.ops.flame.tiled_attention)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(q_shape, k_shape, v_shape)


@register_flop_formula(torch.ops.flame.tiled_attention_backward)
def _(do_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 5 * _flops(q_shape, k_shape, v_shape) // 2


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_forget: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float,
    window: int | None = None,
    prune: float = 0.0,
) -> Tensor:
    """o [B, Tq, H, V]. log_forget [B, Tk, H]; sink [H] (not with gates); prune: the share of a query's weight that leaving
    out far keys may cost, 0 for none."""
    return attention(q, k, v, log_forget, sink, cu_seqlens, scale, window or 0, prune)[0]
