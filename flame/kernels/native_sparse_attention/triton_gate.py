"""The gated sum of the branches in one pass, and its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.block_attention.triton_common import load_rows, store_rows
from flame.kernels.layout import cdiv, power_of_2


@triton.jit
def _gate_kernel(a, b, c, gates, o, rows, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, THREE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = r < rows
    x = tl.load(gates + 3 * r, mask=ok).to(tl.float32)[:, None] * load_rows(a, r, ok, V, BV)
    x += tl.load(gates + 3 * r + 1, mask=ok).to(tl.float32)[:, None] * load_rows(b, r, ok, V, BV)
    if THREE:
        x += tl.load(gates + 3 * r + 2, mask=ok).to(tl.float32)[:, None] * load_rows(c, r, ok, V, BV)
    store_rows(o, r, ok, x, V, BV)


@triton.jit
def _backward_one(x, dx, gates, dgates, do, r, ok, i: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    gate = tl.load(gates + 3 * r + i, mask=ok).to(tl.float32)
    product = tl.sum(do * load_rows(x, r, ok, V, BV).to(tl.float32), 1)
    tl.store(dgates + 3 * r + i, product.to(dgates.dtype.element_ty), mask=ok)
    store_rows(dx, r, ok, do * gate[:, None], V, BV)


@triton.jit
def _gate_backward_kernel(
    do, a, b, c, gates, da, db, dc, dgates, rows,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = r < rows
    grad = load_rows(do, r, ok, V, BV).to(tl.float32)
    _backward_one(a, da, gates, dgates, grad, r, ok, 0, V, BV)
    _backward_one(b, db, gates, dgates, grad, r, ok, 1, V, BV)
    if THREE:
        _backward_one(c, dc, gates, dgates, grad, r, ok, 2, V, BV)


def _launch(V: int) -> dict[str, int]:
    BV = power_of_2(V)
    return {"V": V, "BV": BV, "BR": max(1, 2048 // BV), "num_warps": 4}


def forward(a: Tensor, b: Tensor, c: Tensor | None, gates: Tensor) -> Tensor:
    """gates[..., 0] a + gates[..., 1] b + gates[..., 2] c; a, b, c `[B, T, H, V]`, gates `[B, T, H, 3]`."""
    a, b, gates = a.contiguous(), b.contiguous(), gates.contiguous()
    c = None if c is None else c.contiguous()
    o, options = torch.empty_like(a), _launch(a.shape[-1])
    rows = a.numel() // a.shape[-1]
    _gate_kernel[(cdiv(rows, options["BR"]),)](a, b, c, gates, o, rows, THREE=c is not None, **options)
    return o


def backward(do: Tensor, a: Tensor, b: Tensor, c: Tensor | None, gates: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a, b, c (empty without one) and gates."""
    do, a, b, gates = (x.contiguous() for x in (do, a, b, gates))
    c = None if c is None else c.contiguous()
    da, db, dc = torch.empty_like(a), torch.empty_like(b), a.new_empty(0) if c is None else torch.empty_like(c)
    dgates = torch.empty_like(gates) if c is not None else torch.zeros_like(gates)
    options = _launch(a.shape[-1])
    rows = a.numel() // a.shape[-1]
    _gate_backward_kernel[(cdiv(rows, options["BR"]),)](
        do, a, b, c, gates, da, db, dc, dgates, rows, THREE=c is not None, **options
    )
    return da, db, dc, dgates
