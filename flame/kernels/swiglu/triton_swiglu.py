"""SwiGLU kernels: gate and up are read once in place (rows may be slices of a packed projection), nothing else is kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2, rows

_BLOCK, _WARPS = 2048, 4


@triton.jit
def _forward_kernel(gate, up, y, C, gate_stride, up_stride, BLOCK: tl.constexpr):
    """Program (columns, row)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < C
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask).to(tl.float32)
    tl.store(y + row * C + column, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(dy, gate, up, dgate, dup, C, gate_stride, up_stride, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (columns, row). With VALUE, silu(gate) * up is written where dy was."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < C
    g = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask).to(tl.float32)
    d = tl.load(dy + row * C + column, mask=mask).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + row * C + column, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * C + column, (d * g * s).to(dup.dtype.element_ty), mask=mask)
    if VALUE:
        tl.store(dy + row * C + column, (g * s * u).to(dy.dtype.element_ty), mask=mask)


def _folded(*tensors: Tensor) -> list[Tensor]:
    """The tensors as `[N, C]`, N as small as 65535 allows the grid to be: contiguous ones are refolded into long rows."""
    if all(t.is_contiguous() for t in tensors):
        size = tensors[0].numel()
        width = next((w for w in (8192, 4096, 2048) if size % w == 0 and size // w < 65536), None)
        if width is not None:
            return [t.view(-1, width) for t in tensors]
    return [rows(t) for t in tensors]


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _folded(gate, up)
    C = g.shape[1]
    block = min(_BLOCK, power_of_2(C))
    for at in range(0, len(g), 65535):  # the grid's second dimension is 16 bits
        end = min(at + 65535, len(g))
        _forward_kernel[(cdiv(C, block), end - at)](
            g[at:end], u[at:end], y.view(-1, C)[at:end], C, g.stride(0), u.stride(0), BLOCK=block, num_warps=_WARPS
        )
    return y


_swiglu = torch.library.custom_op("flame::swiglu", forward, mutates_args=())


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous."""
    return backward_over(dy.contiguous(), gate, up, value=False)


def backward_over(dy: Tensor, gate: Tensor, up: Tensor, value: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; contiguous dy becomes silu(gate) * up if `value`."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    g, u = _folded(gate, up)
    C = g.shape[1]
    block = min(_BLOCK, power_of_2(C))
    for at in range(0, len(g), 65535):
        end = min(at + 65535, len(g))
        _backward_kernel[(cdiv(C, block), end - at)](
            dy.view(-1, C)[at:end], g[at:end], u[at:end], dgate.view(-1, C)[at:end], dup.view(-1, C)[at:end],
            C, g.stride(0), u.stride(0), VALUE=value, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip
    return dgate, dup


_swiglu_backward = torch.library.custom_op("flame::swiglu_backward", _gradients, mutates_args=())


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save)
swiglu_backward = Direct(_swiglu_backward, _gradients)
swiglu = Direct(_swiglu, forward, _save, _backward)
