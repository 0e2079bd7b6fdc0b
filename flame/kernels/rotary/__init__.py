"""Rotary position embedding (RoFormer: Su et al., arXiv 2104.09864) with half-split pairs, as in GPT-NeoX and Llama."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend
from flame.kernels.rotary import reference

__all__ = ["rotary"]


def rotary(x: Tensor, positions: Tensor, theta: float = 10000.0, *, backend: str | None = None) -> Tensor:
    """Rotate channel pairs (j, j + D/2) by `position * theta^(-2j/D)`.

    Args:
        x: `[B, T, H, D]`, D even.
        positions: integers `[T]` or `[B, T]`; packed documents restart theirs at 0.
        theta: base of the frequencies.
        backend: 'triton', 'chunked' or 'reference' (the latter two are the same form); default by device.

    Returns:
        like x; angles in fp32, cos and sin rounded to x.dtype, the rotation in fp32.

    Raises:
        FlameError: an odd D or positions of another shape.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise FlameError(f"rotary: x must be [B, T, H, D] with D even; got {tuple(x.shape)}.")
    if tuple(positions.shape) not in ((x.shape[1],), (x.shape[0], x.shape[1])):
        raise FlameError(
            f"rotary: positions must be [T] or [B, T] for x {tuple(x.shape)}; got {tuple(positions.shape)}."
        )
    if pointwise_backend(x, backend) == "triton":
        from flame.kernels.rotary import triton_rotary  # imports triton, which a CPU does not need

        return triton_rotary.rotary(x, positions, theta, False)
    return reference.rotary(x, positions, theta)
