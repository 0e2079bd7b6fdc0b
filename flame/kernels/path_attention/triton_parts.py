"""The parts of PaTH's tree by the tiled kernels of `flame.kernels.softmax_attention`, and two small kernels beside them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.layout import cdiv, power_of_2
from flame.kernels.path_attention.parts import LOG2E, Gradients
from flame.kernels.softmax_attention.triton_backward import attention_dkv, attention_dq
from flame.kernels.softmax_attention.triton_flash import pick_tile, sizes
from flame.kernels.softmax_attention.triton_forward import attention_forward

FLAGS = {"CAUSAL": False, "WINDOW": 0, "PACKED": False, "PRUNE": False}


@triton.jit
def _inverse_kernel(system, out, C: tl.constexpr):
    """(I + strictly lower triangle)^-1 of one block, a row after the other: each needs those above it."""
    r = tl.arange(0, C)
    at = tl.program_id(0).to(tl.int64) * C * C + r[:, None] * C + r[None, :]
    below = -tl.where(r[:, None] > r[None, :], tl.load(system + at), 0.0)
    inverse = below
    for i in range(1, C):
        row = tl.sum(tl.where(r[:, None] == i, below, 0.0), 0)
        row += tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where(r[:, None] == i, row[None, :], inverse)
    tl.store(out + at, inverse + tl.where(r[:, None] == r[None, :], 1.0, 0.0))


@triton.jit
def _merge_kernel(o, lse, seen, seen_lse, rows, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """Weighs two outputs of the same queries by their normalizers; the sum replaces the first."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BV)
    live = r < rows
    own = tl.load(lse + r, mask=live, other=0.0)
    other = tl.load(seen_lse + r, mask=live, other=0.0)
    most = tl.maximum(own, other)
    total = most + tl.log2(tl.exp2(own - most) + tl.exp2(other - most))
    at = r[:, None] * V + d[None, :]
    mask = live[:, None] & (d < V)[None, :]
    x = tl.load(o + at, mask=mask, other=0.0) * tl.exp2(own - total)[:, None]
    x += tl.load(seen + at, mask=mask, other=0.0).to(tl.float32) * tl.exp2(other - total)[:, None]
    tl.store(o + at, x, mask=mask)
    tl.store(lse + r, total, mask=live)


def _launch(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    tensors = tuple(x.contiguous().unsqueeze(2) for x in (q, k, v))
    return tensors, tuple(width for x in (q, k, v) for width in (x.shape[-1], 0))


def _halves(bias: Tensor) -> Tensor:
    """What is taken off the base-2 score of every key, in the kernels' two halves; the second holds nothing."""
    sums = bias.new_zeros(2, *bias.shape)
    torch.neg(bias, out=sums[0])
    return sums


class TritonParts:
    """`flame.kernels.path_attention.parts.Parts` for at most fp32."""

    def inverse(self, system: Tensor) -> Tensor:
        system = system.contiguous()
        out = torch.empty_like(system)
        _inverse_kernel[(system.shape[0],)](system, out, C=system.shape[-1])
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        (q, k, v), strides = _launch(q, k, v)
        (N, Tq), Tk = q.shape[:2], k.shape[1]
        o, lse = q.new_empty(N, Tq, v.shape[3]), q.new_empty(N, Tq, dtype=torch.float32)
        tile = pick_tile("forward", q, v, bias is not None)
        count, sums = cdiv(Tq, tile["BM"]), None if bias is None else _halves(bias)
        attention_forward[(count * N,)](
            q, k, v, o, lse, lse if sums is None else sums, None, None, None, *strides, Tq, Tk, count, N * Tk,
            scale * LOG2E, GATED=bias is not None, SINK=False, **FLAGS, **sizes(q, k, v), **tile,
        )  # fmt: skip
        return o, lse

    def merge(self, o: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor) -> None:
        V, rows = o.shape[-1], lse.numel()
        BV = max(16, power_of_2(V))
        BR = max(1, 4096 // BV)
        seen, seen_lse = seen.contiguous(), seen_lse.contiguous()
        _merge_kernel[(cdiv(rows, BR),)](o, lse, seen, seen_lse, rows, V=V, BV=BV, BR=BR)

    def differentiate(
        self, rows: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Gradients:
        o, do, lse = (x.contiguous() for x in rows[1:])
        (q, k, v), strides = _launch(rows[0], k, v)
        (N, Tq), Tk, gated = q.shape[:2], k.shape[1], bias is not None
        dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
        sums, columns, totals = lse, None, None
        if bias is not None:
            sums, columns, totals = _halves(bias), torch.empty_like(bias), torch.empty_like(lse)
        strides = (*strides, v.shape[3], 0)
        numbers = (N * Tk, scale * LOG2E, scale)
        flags = {"GATED": gated, **FLAGS, **sizes(q, k, v)}
        tall, wide = (pick_tile(name, q, v, gated) for name in ("dq", "dkv"))
        attention_dq[(cdiv(Tq, tall["BM"]) * N,)](
            q, k, v, o, do, lse, delta, dq, totals, sums, None, None,
            *strides, Tq, Tk, cdiv(Tq, tall["BM"]), *numbers, **flags, **tall,
        )  # fmt: skip
        attention_dkv[(cdiv(Tk, wide["BN"]) * N,)](
            q, k, v, do, lse, delta, dk, dv, columns, sums, None, None, None,
            *strides, Tq, Tk, cdiv(Tk, wide["BN"]), *numbers, **flags, **wide,
        )  # fmt: skip
        return dq.squeeze(2), dk.squeeze(2), dv.squeeze(2), columns, totals
