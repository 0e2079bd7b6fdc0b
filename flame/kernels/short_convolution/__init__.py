"""Depthwise causal convolution over a few tokens, as used in front of linear-attention and state-space mixers."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.sequence import SequenceShard, refuse_states
from flame.kernels.short_convolution import chunked, reference

__all__ = ["short_convolution"]


def short_convolution(  # noqa: PLR0913 (one op)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`y_t = act(sum_j weight[:, j] * x_{t-W+1+j} + bias)`, a cross-correlation: the last tap meets the current token.

    A decode step is the same call with T = 1, the cached state and `output_final_state=True`.

    Args:
        x: `[B, T, C]`; with `cu_seqlens`, B is 1.
        weight: `[C, W]`, W from 1 to 16.
        bias: `[C]` or None.
        activation: None or 'silu'.
        initial_state: `[N, C, W]`, the last W raw inputs of each sequence, newest last (N = B, or documents).
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` boundaries of packed documents; none sees another.
        backend: 'triton' (W <= 4), 'chunked' or 'reference'; default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        y `[B, T, C]` in x.dtype (sums in fp32) and the final state `[N, C, W]` in x.dtype, or None. Both carry
        gradients to x and initial_state, y also to weight and bias.

    Raises:
        FlameError: shapes that do not fit together, an unknown activation or backend.
    """
    _check(x, weight, activation, initial_state, cu_seqlens)
    if shard is not None:
        from flame.kernels.short_convolution.sharded import state_before

        refuse_states("short_convolution", initial_state, output_final_state)
        initial_state = state_before(x, weight.shape[1], cu_seqlens, shard)
    chosen = _backend(x, weight, backend)
    if chosen == "reference":
        y, state = reference.short_convolution(x, weight, bias, activation, initial_state, cu_seqlens)
        return y, state if output_final_state else None
    if chosen == "triton":
        from flame.kernels.short_convolution import triton_ops  # imports triton, which a CPU does not need

        y = triton_ops.short_convolution(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    else:
        y = chunked.short_convolution(x, weight, bias, activation, initial_state, cu_seqlens)
    if not output_final_state:
        return y, None
    return y, chunked.final_state(x, weight.shape[1], initial_state, cu_seqlens)


def _backend(x: Tensor, weight: Tensor, requested: str | None) -> str:
    """The kernels have up to four taps and no fp64."""
    fits = weight.shape[1] <= 4 and x.dtype != torch.float64
    return select_backend(x, requested, ("triton", "chunked", "reference") if fits else ("chunked", "reference"))


def _check(x: Tensor, weight: Tensor, activation: str | None, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise FlameError(
            f"short_convolution: x must be [B, T, C] and weight [C, W]; got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if not 1 <= weight.shape[1] <= 16:
        raise FlameError(f"short_convolution: the width W must be 1 to 16; got {weight.shape[1]}.")
    if activation not in (None, "silu"):
        raise FlameError(f"short_convolution: activation must be None or 'silu'; got {activation!r}.")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise FlameError(
            f"short_convolution: cu_seqlens needs B = 1 (documents packed in one row); got B = {x.shape[0]}."
        )
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    expected = (sequences, *weight.shape)
    if state is not None and tuple(state.shape) != expected:
        raise FlameError(f"short_convolution: initial_state must be [N, C, W] = {expected}; got {tuple(state.shape)}.")
