"""SwiGLU in plain torch. Only gate and up are kept for backward; the sigmoid is computed again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in at least fp32, rounded to gate.dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    d, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    sigmoid = torch.sigmoid(g)
    return (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype), (d * g * sigmoid).to(up.dtype)


class SwiGLU(torch.autograd.Function):
    """swiglu that saves its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(grads[0], *ctx.saved_tensors)
