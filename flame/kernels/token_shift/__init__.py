"""Difference of each token to the one before it, and mixes of the two (RWKV: Peng et al., arXiv 2305.13048, 2503.14456)."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend
from flame.kernels.sequence import SequenceShard, opening_states, refuse_states
from flame.kernels.token_shift import reference

__all__ = ["token_mix", "token_shift"]

MOST_MIXES = 6  # of one call: RWKV-7's r, w, k, v, a, g


def token_shift(
    x: Tensor,
    *,
    state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`x_{t-1} - x_t`; the token before a sequence is its `state`, or zero.

    Args:
        x: `[B, T, C]`; with `cu_seqlens`, B is 1.
        state: `[N, C]`, the last token seen of each sequence (N = B, or documents), or None.
        output_final_state: also return the last token of each sequence.
        cu_seqlens: `[N + 1]` boundaries of packed documents; none sees another.
        backend: 'triton', 'chunked' or 'reference'; default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        the difference `[B, T, C]` in x.dtype and the final state `[N, C]` or None. Gradients flow to x and state.

    Raises:
        FlameError: shapes that do not fit together or an unknown backend.
    """
    state = _opening("token_shift", x, state, output_final_state, cu_seqlens, shard)
    if pointwise_backend(x, backend) == "triton":
        from flame.kernels.token_shift import triton_shift  # imports triton, which a CPU does not need

        shifted = triton_shift.token_shift(x, state, cu_seqlens)
    else:
        shifted = reference.token_shift(x, state, cu_seqlens)
    return shifted, reference.final_state(x, state, cu_seqlens) if output_final_state else None


def token_mix(
    x: Tensor,
    weight: Tensor,
    *,
    state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Mixes of each token with the one before it, `x_t + weight_s (x_{t-1} - x_t)` for every s, in one pass over x.

    Args:
        x, state, output_final_state, cu_seqlens, backend, shard: as for `token_shift`.
        weight: `[S, C]`, one row a mix, 1 to 6 of them.

    Returns:
        S mixes `[B, T, C]` in x.dtype and the final state `[N, C]` or None. Gradients flow to x, weight and state.

    Raises:
        FlameError: shapes that do not fit together or an unknown backend.
    """
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not 0 < len(weight) <= MOST_MIXES:
        raise FlameError(
            f"token_mix: weight must be [S, C] with S of 1 to {MOST_MIXES} and C = {x.shape[-1]}; got {tuple(weight.shape)}."
        )
    state = _opening("token_mix", x, state, output_final_state, cu_seqlens, shard)
    if pointwise_backend(x, backend) == "triton":
        from flame.kernels.token_shift import triton_mix  # imports triton, which a CPU does not need

        mixes = tuple(triton_mix.token_mix(x, weight, state, cu_seqlens))
    else:
        shifted = reference.token_shift(x, state, cu_seqlens)
        mixes = tuple(x + shifted * row for row in weight.to(x.dtype))
    return mixes, reference.final_state(x, state, cu_seqlens) if output_final_state else None


def _opening(
    op: str,
    x: Tensor,
    state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    shard: SequenceShard | None,
) -> Tensor | None:
    """The tokens before every sequence `[N, C]`: the caller's, or those that another rank holds."""
    if x.dim() != 3 or (cu_seqlens is not None and x.shape[0] != 1):
        raise FlameError(f"{op}: x must be [B, T, C], with B = 1 when cu_seqlens is given; got {tuple(x.shape)}.")
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and tuple(state.shape) != (sequences, x.shape[2]):
        raise FlameError(f"{op}: state must be [N, C] = {(sequences, x.shape[2])}; got {tuple(state.shape)}.")
    if shard is None:
        return state
    refuse_states(op, state, output_final_state)
    return opening_states(shard.tail(x, 1)[:, 0], sequences)
