"""Rotary embedding in plain torch: angles in fp32, cos and sin rounded to the activation dtype, rotation in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * theta^(-2j / width)`, each `[..., width / 2]`, rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=wide) / width
    angles = positions.to(wide)[..., None] * (1.0 / theta**exponent)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs (j, j + D/2) of x `[B, T, H, D]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[..., None, :].to(wide) for table in cos_sin(positions, x.shape[-1], theta, x.dtype))
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
