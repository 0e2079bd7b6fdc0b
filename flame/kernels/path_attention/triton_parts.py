"""Attention of a set of queries to a whole set of keys, no mask, with its normalizer: what PaTH's tree of blocks adds up.

The kernels are those of `flame.kernels.softmax_attention`. Both results carry gradients, so that parts can be merged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv
from flame.kernels.softmax_attention.triton_backward import attention_dkv, attention_dq
from flame.kernels.softmax_attention.triton_flash import LOG2E, pick_tile, sizes
from flame.kernels.softmax_attention.triton_forward import attention_forward

FLAGS = {"CAUSAL": False, "WINDOW": 0, "PACKED": False, "PRUNE": False}


def _halves(bias: Tensor) -> Tensor:
    """What is taken off the base-2 score of every key, in the kernels' two halves; the second holds nothing."""
    sums = bias.new_zeros(2, *bias.shape)
    torch.mul(bias, -LOG2E, out=sums[0])
    return sums


def _launch(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    tensors = tuple(x.contiguous().unsqueeze(2) for x in (q, k, v))
    return tensors, tuple(width for x in (q, k, v) for width in (x.shape[-1], 0))


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, Tq, K], k [N, Tk, K], v [N, Tk, V], bias [N, Tk] fp32 on each key's score -> o [N, Tq, V], lse [N, Tq]."""
    (q, k, v), strides = _launch(q, k, v)
    (N, Tq), Tk = q.shape[:2], k.shape[1]
    o, lse = q.new_empty(N, Tq, v.shape[3]), q.new_empty(N, Tq, dtype=torch.float32)
    tile = pick_tile("forward", q, v, bias is not None)
    count, sums = cdiv(Tq, tile["BM"]), None if bias is None else _halves(bias)
    attention_forward[(count * N,)](
        q, k, v, o, lse, lse if sums is None else sums, None, None, None, *strides, Tq, Tk, count, N * Tk, scale * LOG2E,
        GATED=bias is not None, SINK=False, **FLAGS, **sizes(q, k, v), **tile,
    )  # fmt: skip
    return o, lse.mul_(math.log(2))


_part = torch.library.custom_op("flame::part_attention", _forward, mutates_args=())


@_part.register_fake
def _(q, k, v, bias, scale):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _gradients(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (q, k, v), strides = _launch(q, k, v)
    do, lse, dlse = do.to(q.dtype).contiguous(), lse * LOG2E, dlse.float().contiguous()
    (N, Tq), Tk = q.shape[:2], k.shape[1]
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    dbias = lse.new_empty(0) if bias is None else lse.new_empty(N, Tk)
    gated, strides = bias is not None, (*strides, v.shape[3], 0)
    sums = lse if bias is None else _halves(bias)
    numbers = (N * Tk, scale * LOG2E, scale)
    flags = {"GATED": gated, **FLAGS, **sizes(q, k, v)}
    rows, keys = (pick_tile(name, q, v, gated) for name in ("dq", "dkv"))
    attention_dq[(cdiv(Tq, rows["BM"]) * N,)](
        q, k, v, o, do, lse, dlse, delta, dq, torch.empty_like(lse) if gated else None, sums, None, None,
        *strides, Tq, Tk, cdiv(Tq, rows["BM"]), *numbers, DLSE=True, **flags, **rows,
    )  # fmt: skip
    attention_dkv[(cdiv(Tk, keys["BN"]) * N,)](
        q, k, v, do, lse, delta, dk, dv, dbias if gated else None, sums, None, None, None,
        *strides, Tq, Tk, cdiv(Tk, keys["BN"]), *numbers, **flags, **keys,
    )  # fmt: skip
    return dq.squeeze(2), dk.squeeze(2), dv.squeeze(2), dbias


_part_backward = torch.library.custom_op("flame::part_attention_backward", _gradients, mutates_args=())


@_part_backward.register_fake
def _(do, dlse, q, k, v, bias, o, lse, scale):
    dbias = lse.new_empty(0) if bias is None else lse.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = part_attention_backward(do, dlse, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None if ctx.saved_tensors[3] is None else dbias, None


_part.register_autograd(_backward, setup_context=_save)
part_attention_backward = Direct(_part_backward, _gradients)
part_attention = Direct(_part, _forward, _save, _backward)


@register_flop_formula(torch.ops.flame.part_attention)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * q_shape[0] * q_shape[1] * k_shape[1] * (k_shape[2] + v_shape[2])


@register_flop_formula(torch.ops.flame.part_attention_backward)
def _(do_shape, dlse_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 5 * q_shape[0] * q_shape[1] * k_shape[1] * (k_shape[2] + v_shape[2])
