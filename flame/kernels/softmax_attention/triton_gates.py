"""Running sums of gates and the gradient they leave, a kernel each: in torch they are a dozen small launches.

Sums are fp64, a row of a head a program, which walks it in spans.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
SPAN = 1024


@triton.jit
def _sum_kernel(gates, out, T, length, size, factor, H: tl.constexpr, SPAN: tl.constexpr):
    """gates [B, T, H] -> out [2, B, H, length]: their sums times factor, as what fp32 holds and what it drops."""
    row = tl.program_id(0).to(tl.int64)
    gates += row // H * T * H + row % H
    out += row * length
    before = tl.zeros([1], tl.float64)
    for start in range(0, length, SPAN):
        t = start + tl.arange(0, SPAN)
        x = tl.load(gates + t.to(tl.int64) * H, mask=t < T, other=0.0).to(tl.float64)
        total = tl.cumsum(x, 0) + before
        scaled = total * factor
        high = scaled.to(tl.float32)
        tl.store(out + t, high, mask=t < length)
        tl.store(out + size + t, (scaled - high.to(tl.float64)).to(tl.float32), mask=t < length)
        before += tl.sum(x, 0)


@triton.jit
def _gradient_kernel(rows, columns, out, Tq, Tk, H: tl.constexpr, SPAN: tl.constexpr):
    """Suffix sums of rows [B, H, Tq], aligned with the last keys, less columns [B, H, Tk]: out [B, Tk, H] fp32."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * Tq
    columns += row * Tk
    out += row // H * Tk * H + row % H
    after = tl.zeros([1], tl.float64)
    for back in range(0, Tk, SPAN):
        t = Tk - 1 - back - tl.arange(0, SPAN)  # from the end, so that a prefix is the suffix
        i = t - (Tk - Tq)
        x = tl.load(rows + i, mask=i >= 0, other=0.0).to(tl.float64)
        x -= tl.load(columns + t, mask=t >= 0, other=0.0).to(tl.float64)
        total = tl.cumsum(x, 0) + after
        tl.store(out + t.to(tl.int64) * H, total.to(tl.float32), mask=t >= 0)
        after += tl.sum(x, 0)


def running_sums(log_forget: Tensor, factor: float = LOG2E, length: int | None = None) -> Tensor:
    """As `gates.running_sums`, of at most fp32, times `factor` and up to `length` tokens, the last sum on."""
    gates = log_forget.detach().contiguous()
    B, T, H = gates.shape
    length = T if length is None else length
    out = gates.new_empty(2, B, H, length, dtype=torch.float32)
    _sum_kernel[(B * H,)](gates, out, T, length, out.stride(0), factor, H=H, SPAN=SPAN, num_warps=4)
    return out


def gate_gradient(rows: Tensor, columns: Tensor) -> Tensor:
    """d log_forget `[B, Tk, H]` from the row sums `[B, H, Tq]` and the column sums `[B, H, Tk]` of dS: `gates.gate_gradient`
    without documents."""
    (B, H, Tk), Tq = columns.shape, rows.shape[2]
    out = columns.new_empty(B, Tk, H)
    _gradient_kernel[(B * H,)](rows, columns, out, Tq, Tk, H=H, SPAN=SPAN, num_warps=4)
    return out
