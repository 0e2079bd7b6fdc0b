"""Norms as their papers write them, in plain torch: math in at least fp32, output in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """The unrounded sum, in at least fp32."""
    return _wide(x) if residual is None else _wide(x) + _wide(residual)


def rms(x: Tensor, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over each of `groups` runs of channels; x and result in fp32."""
    grouped = x.unflatten(-1, (groups, -1))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return y if weight is None else y * weight.to(y.dtype)


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over each of `groups` runs of channels; x and result in fp32."""
    grouped = x.unflatten(-1, (groups, -1))
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def gated_rms(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str, gate_first: bool, groups: int
) -> Tensor:
    """rms(x) * act(gate), or rms(x * act(gate)) when `gate_first`."""
    act = F.silu if activation == "silu" else torch.sigmoid
    opened = act(_wide(gate))
    if gate_first:
        return rms(_wide(x) * opened, weight, eps, groups).to(x.dtype)
    return (rms(_wide(x), weight, eps, groups) * opened).to(x.dtype)


def l2(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
