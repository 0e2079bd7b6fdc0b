"""One forward and one backward kernel for all norms. A program holds whole rows in registers: each tensor is read once.

Rows are `[N, groups, C]`; weight and bias are `[groups, C]`. Backward recomputes the statistics from the saved input, so that
nothing else is kept; weight gradients are summed per program in a fixed order, then over programs by a second reduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.layout import cdiv, power_of_2, rows
from flame.kernels.triton_sum import sum_partials


@triton.jit
def _activation(g, SIGMOID: tl.constexpr):
    """(act(g), act'(g)) of silu or sigmoid."""
    s = tl.sigmoid(g)
    if SIGMOID:
        value, slope = s, s * (1.0 - s)
    else:
        value, slope = g * s, s * (1.0 + g * (1.0 - s))
    return value, slope


@triton.jit
def _normalized(x, mask, C, eps, LAYER: tl.constexpr, L2: tl.constexpr):
    """x-hat and 1/deviation of rows `[R, BLOCK]`; masked columns of x are 0 and stay 0."""
    if LAYER:
        x = tl.where(mask, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    squares = tl.sum(x * x, axis=1)
    rstd = tl.rsqrt((squares if L2 else squares / C) + eps)
    return x * rstd[:, None], rstd


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, gate_ptr, y_ptr, total_ptr, N, C, x_stride, residual_stride, gate_stride, eps,
    LAYER: tl.constexpr, L2: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, g): rows i * ROWS ... of group g."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    group = tl.program_id(1) * C
    mask = (row < N) & (column < C)
    out = row * (C * tl.num_programs(1)) + group + column
    x = tl.load(x_ptr + row * x_stride + group + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + group + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + out, x.to(total_ptr.dtype.element_ty), mask=mask)
    if GATE:
        g = tl.load(gate_ptr + row * gate_stride + group + column, mask=mask, other=0.0).to(tl.float32)
        opened, _ = _activation(g, SIGMOID)
        if GATE_FIRST:
            x *= opened
    y, _ = _normalized(x, mask, C, eps, LAYER, L2)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + group + column, mask=column < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + group + column, mask=column < C, other=0.0).to(tl.float32)
    if GATE and not GATE_FIRST:
        y *= opened
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, gate_ptr, dx_ptr, dgate_ptr, dweight_ptr, dbias_ptr,
    N, C, x_stride, gate_stride, eps,
    LAYER: tl.constexpr, L2: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, g) walks over row tiles i, i + programs, ... of group g and leaves one partial sum of dweight, dbias."""
    column = tl.arange(0, BLOCK)[None, :]
    group = tl.program_id(1) * C
    width = C * tl.num_programs(1)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + group + column, mask=column < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < N) & (column < C)
        dense = row * width + group + column
        x = tl.load(x_ptr + row * x_stride + group + column, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            g = tl.load(gate_ptr + row * gate_stride + group + column, mask=mask, other=0.0).to(tl.float32)
            opened, slope = _activation(g, SIGMOID)
        if GATE and GATE_FIRST:
            xhat, rstd = _normalized(x * opened, mask, C, eps, LAYER, L2)
        else:
            xhat, rstd = _normalized(x, mask, C, eps, LAYER, L2)
        if GATE and not GATE_FIRST:
            n = xhat
            if weight_ptr is not None:
                n *= weight
            tl.store(dgate_ptr + dense, (d * n * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
            d *= opened
        if dweight_ptr is not None:
            dweight += d * xhat
        if dbias_ptr is not None:
            dbias += d
        if weight_ptr is not None:
            d *= weight
        along = tl.sum(d * xhat, axis=1)
        dx = d - xhat * (along if L2 else along / C)[:, None]
        if LAYER:
            dx -= (tl.sum(d, axis=1) / C)[:, None]
        dx *= rstd[:, None]
        if GATE and GATE_FIRST:
            tl.store(dgate_ptr + dense, (dx * x * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
            dx *= opened
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * width + group + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < C
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=inside)


@lru_cache(maxsize=256)
def tile_key(kernel: str, C: int, gated: bool) -> str:
    """Key of the tile of 'forward' or 'backward' for rows of C channels."""
    return tiles.key(kernel, C=power_of_2(C), gated=gated)


@lru_cache(maxsize=256)
def default_tile(kernel: str, C: int) -> dict[str, int]:
    """elements: of a tile of whole rows (at least one); programs: of the backward, a multiprocessor."""
    warps = 4 if C <= 4096 else 8 if C <= 8192 else 16 if C <= 16384 else 32
    if kernel == "forward":
        return {"elements": 2048, "num_warps": warps}
    if C <= 512:
        return {"elements": 1024, "num_warps": warps, "programs": 8}
    return {"elements": 8192, "num_warps": max(8, warps), "programs": 2}


def choose(kernel: str, x: Tensor, C: int, gated: bool) -> tuple[tiles.Tile, int, int]:
    """The tile, and the rows and columns it spans."""
    tile = tiles.choose("normalization", tile_key(kernel, C, gated), default_tile(kernel, C), x.device)
    block = power_of_2(C)
    return tile, max(1, tile["elements"] // block), block


@dataclass(frozen=True)
class Kind:
    """Which norm. gating: 'none', or 'silu' / 'sigmoid', with '_first' when the gate multiplies before the norm."""

    norm: str  # 'rms', 'layer' or 'l2'
    gating: str
    eps: float
    groups: int

    def flags(self) -> dict[str, bool]:
        """The compile-time switches of both kernels."""
        return {
            "LAYER": self.norm == "layer",
            "L2": self.norm == "l2",
            "GATE": self.gating != "none",
            "SIGMOID": self.gating.startswith("sigmoid"),
            "GATE_FIRST": self.gating.endswith("_first"),
        }


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None, kind: Kind,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y like x (contiguous) and x + residual in residual.dtype (empty without one)."""
    flat, C = rows(x), x.shape[-1] // kind.groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    beside = None if residual is None else rows(residual)
    gates = None if gate is None else rows(gate)
    tile, height, block = choose("forward", x, C, gate is not None)
    if flat.shape[0]:
        norm_forward_kernel[(cdiv(flat.shape[0], height), kind.groups)](
            flat, weight, bias, beside, gates, y, total, flat.shape[0], C, flat.stride(0),
            0 if beside is None else beside.stride(0), 0 if gates is None else gates.stride(0), kind.eps,
            **kind.flags(), ROWS=height, BLOCK=block, num_warps=tile["num_warps"],
        )  # fmt: skip
    return y, total


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, kind: Kind,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (in x.dtype; the residual's as well), gate, weight and bias; empty for what is None."""
    flat, dys, C = rows(x), dy.contiguous(), x.shape[-1] // kind.groups
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gates = None if gate is None else rows(gate)
    dgate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    tile, height, block = choose("backward", x, C, gate is not None)
    most = cdiv(tile["programs"] * tiles.multiprocessors(x.device), kind.groups)
    programs = max(1, min(cdiv(flat.shape[0], height), most))
    dweight, dbias = (
        None if p is None else torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        for p in (weight, bias)
    )
    norm_backward_kernel[(programs, kind.groups)](
        dys, None if dtotal is None else dtotal.contiguous(), flat, weight, gates, dx, dgate, dweight, dbias,
        flat.shape[0], C, flat.stride(0), 0 if gates is None else gates.stride(0), kind.eps,
        **kind.flags(), ROWS=height, BLOCK=block, num_warps=tile["num_warps"],
    )  # fmt: skip
    return (
        dx,
        x.new_empty(0) if dgate is None else dgate,
        x.new_empty(0) if weight is None or dweight is None else sum_partials(dweight, weight.dtype),
        x.new_empty(0) if bias is None or dbias is None else sum_partials(dbias, bias.dtype),
    )
