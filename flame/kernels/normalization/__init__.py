"""RMS, layer, group, gated RMS and l2 norms, with an optional fused residual addition.

All run in fp32 inside and return x.dtype. With `residual`, the sum `x + residual` is formed in fp32, the *unrounded*
sum is normalised, and the sum rounded to the residual's dtype is returned beside the output, to be the next residual.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend
from flame.kernels.normalization import reference

__all__ = ["gated_rms_norm", "group_norm", "l2_norm", "layer_norm", "rms_norm"]


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    residual: None = ...,
    *,
    groups: int = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor, *, groups: int = ..., backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: `[..., C]`.
        weight: `[C]` in any float dtype, or None.
        eps: added to the mean of squares.
        residual: `[..., C]`, added to x first; see the module's text.
        groups: the mean runs over each of this many contiguous runs of C / groups channels.
        backend: 'triton', 'chunked' or 'reference' (the latter two are the same form); default by device.

    Returns:
        y like x, or (y, x + residual rounded to residual.dtype) when a residual is given.

    Raises:
        FlameError: shapes that do not fit together or an unknown backend.
    """
    _check("rms_norm", x, weight, None, residual, groups)
    if pointwise_backend(x, backend) == "triton":
        y, total = _fused(x, weight, None, residual, None, "rms", "none", eps, groups)
        return y if residual is None else (y, total)
    total = reference.add_residual(x, residual)
    y = reference.rms(total, weight, eps, groups).to(x.dtype)
    return y if residual is None else (y, total.to(residual.dtype))


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    residual: None = ...,
    *,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor, *, backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (Ba et al., arXiv 1607.06450).

    Shapes, result and errors as in `rms_norm`; bias `[C]` or None.
    """
    _check("layer_norm", x, weight, bias, residual, 1)
    if pointwise_backend(x, backend) == "triton":
        y, total = _fused(x, weight, bias, residual, None, "layer", "none", eps, 1)
        return y if residual is None else (y, total)
    total = reference.add_residual(x, residual)
    y = reference.layer(total, weight, bias, eps, 1).to(x.dtype)
    return y if residual is None else (y, total.to(residual.dtype))


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer norm over each of `groups` contiguous runs of C / groups channels, then weight and bias per channel.

    x `[..., C]` (channels last, every leading position on its own), weight and bias `[C]` or None; like x. Wu and He,
    arXiv 1803.08494, without its mean over space. Raises FlameError when C does not divide.
    """
    _check("group_norm", x, weight, bias, None, groups)
    if pointwise_backend(x, backend) == "triton":
        return _fused(x, weight, bias, None, None, "layer", "none", eps, groups)[0]
    return reference.layer(reference.add_residual(x, None), weight, bias, eps, groups).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "silu",
    gate_first: bool = False,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """`rms(x) * weight * act(gate)`, or with `gate_first` `rms(x * act(gate)) * weight` (Mamba-2, arXiv 2405.21060).

    x and gate `[..., C]`, weight `[C]` or None, activation 'silu' or 'sigmoid'; `groups` and errors as in `rms_norm`.
    Returns x.dtype; everything inside in fp32.
    """
    _check("gated_rms_norm", x, weight, None, gate, groups)
    if activation not in ("silu", "sigmoid"):
        raise FlameError(f"gated_rms_norm: activation must be 'silu' or 'sigmoid'; got {activation!r}.")
    if pointwise_backend(x, backend) == "triton":
        gating = activation + "_first" if gate_first else activation
        return _fused(x, weight, None, None, gate, "rms", gating, eps, groups)[0]
    return reference.gated_rms(x, gate, weight, eps, activation, gate_first, groups)


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension, eps inside the root; x `[..., C]`, result like x."""
    if pointwise_backend(x, backend) == "triton":
        return _fused(x, None, None, None, None, "l2", "none", eps, 1)[0]
    return reference.l2(x, eps)


def _fused(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from flame.kernels.normalization import triton_ops  # imports triton, which a CPU does not need

    return triton_ops.norm(x, *arguments)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, groups: int) -> None:
    C = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (C,):
            raise FlameError(
                f"{op}: {name} must be [C] = [{C}], as the last dimension of x; got {tuple(parameter.shape)}."
            )
    if beside is not None and beside.shape != x.shape:
        raise FlameError(
            f"{op}: x {tuple(x.shape)} and its residual or gate {tuple(beside.shape)} must have one shape."
        )
    if groups < 1 or C % groups:
        raise FlameError(f"{op}: {C} channels do not divide into {groups} groups.")
