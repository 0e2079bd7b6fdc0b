"""The gated sum of the branches in one pass, and what its gradient asks of each branch.

A branch's gradient is the output's times its gate, row by row. The factor need not be multiplied into a tensor of its own:
taken off the branch's log-sum it scales all its weights, and with them every gradient. So gates must not be negative.
"""

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
def _branch(x, lse, gates, dgates, delta, weight, do, r, ok, i: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    gate = tl.load(gates + 3 * r + i, mask=ok, other=1.0).to(tl.float32)
    product = tl.sum(do * load_rows(x, r, ok, V, BV).to(tl.float32), 1)
    tl.store(dgates + 3 * r + i, product.to(dgates.dtype.element_ty), mask=ok)
    tl.store(delta + r, product, mask=ok)
    tl.store(weight + r, tl.load(lse + r, mask=ok, other=0.0) - tl.log2(gate), mask=ok)


@triton.jit
def _gate_backward_kernel(
    do, a, a_lse, b, b_lse, c, gates, a_delta, a_weight, b_delta, b_weight, dc, dgates, rows,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = r < rows
    grad = load_rows(do, r, ok, V, BV).to(tl.float32)
    _branch(a, a_lse, gates, dgates, a_delta, a_weight, grad, r, ok, 0, V, BV)
    _branch(b, b_lse, gates, dgates, b_delta, b_weight, grad, r, ok, 1, V, BV)
    if THREE:
        gate = tl.load(gates + 3 * r + 2, mask=ok).to(tl.float32)
        product = tl.sum(grad * load_rows(c, r, ok, V, BV).to(tl.float32), 1)
        tl.store(dgates + 3 * r + 2, product.to(dgates.dtype.element_ty), mask=ok)
        store_rows(dc, r, ok, grad * gate[:, None], V, BV)


def _launch(V: int) -> dict[str, int]:
    BV = power_of_2(V)
    return {"V": V, "BV": BV, "BR": max(1, 2048 // BV), "num_warps": 4}


def forward(a: Tensor, b: Tensor, c: Tensor | None, gates: Tensor) -> Tensor:
    """gates[..., 0] a + gates[..., 1] b + gates[..., 2] c; a, b, c `[B, T, H, V]`, gates `[B, T, H, 3]`."""
    gates = gates.contiguous()
    c = None if c is None else c.contiguous()
    o, options = torch.empty_like(a), _launch(a.shape[-1])
    rows = a.numel() // a.shape[-1]
    _gate_kernel[(cdiv(rows, options["BR"]),)](a, b, c, gates, o, rows, THREE=c is not None, **options)
    return o


def backward(
    do: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], c: Tensor | None, gates: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    """For a and b, outputs with their log2 sums: log2 sums that carry the gate, and rowsum(output do), each `[B, T, H]`.
    Then the gradients of c (empty without one) and of gates."""
    gates = gates.contiguous()
    c = None if c is None else c.contiguous()
    a_delta, a_weight, b_delta, b_weight = (torch.empty_like(a[1]) for _ in range(4))
    dc = do.new_empty(0) if c is None else torch.empty_like(c)
    dgates = torch.empty_like(gates) if c is not None else torch.zeros_like(gates)
    options, rows = _launch(do.shape[-1]), a[1].numel()
    _gate_backward_kernel[(cdiv(rows, options["BR"]),)](
        do, *a, *b, c, gates, a_delta, a_weight, b_delta, b_weight, dc, dgates, rows, THREE=c is not None, **options
    )
    return (a_weight, a_delta), (b_weight, b_delta), dc, dgates
