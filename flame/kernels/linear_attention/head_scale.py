"""What a state-space layer writes: its input times the step of each head (Mamba-2: Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend

__all__ = ["scale_heads"]


def scale_heads(x: Tensor, factor: Tensor, *, backend: str | None = None) -> Tensor:
    """`x * factor[..., None]`, multiplied in fp32 and returned in x.dtype, each tensor read once in both directions.

    Args:
        x: `[B, T, H, P]`; batch, time and heads may be strided.
        factor: `[B, T, H]`.
        backend: 'triton' or 'chunked' (plain torch); default by device.

    Raises:
        FlameError: shapes that do not fit together or an unknown backend.
    """
    check_factor(x, factor)
    if pointwise_backend(x, backend) == "triton":
        from flame.kernels.linear_attention import triton_head_scale  # imports triton, which a CPU does not need

        return triton_head_scale.scale_heads(x, factor)
    return (x * factor[..., None]).to(x.dtype)


def check_factor(x: Tensor, factor: Tensor) -> None:
    """Raises FlameError unless x is [B, T, H, P] and factor [B, T, H]."""
    if x.dim() != 4 or factor.shape != x.shape[:3]:
        raise FlameError(
            f"A factor of heads [B, T, H] goes with x [B, T, H, P]; got {tuple(factor.shape)} and {tuple(x.shape)}."
        )
