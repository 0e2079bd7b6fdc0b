"""Difference of each token to the one before it (the token shift of RWKV: Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend
from flame.kernels.sequence import SequenceShard, opening_states, refuse_states
from flame.kernels.token_shift import reference

__all__ = ["token_shift"]


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
    if x.dim() != 3 or (cu_seqlens is not None and x.shape[0] != 1):
        raise FlameError(
            f"token_shift: x must be [B, T, C], with B = 1 when cu_seqlens is given; got {tuple(x.shape)}."
        )
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and tuple(state.shape) != (sequences, x.shape[2]):
        raise FlameError(f"token_shift: state must be [N, C] = {(sequences, x.shape[2])}; got {tuple(state.shape)}.")
    if shard is not None:
        refuse_states("token_shift", state, output_final_state)
        state = opening_states(shard.tail(x, 1)[:, 0], sequences)
    if pointwise_backend(x, backend) == "triton":
        from flame.kernels.token_shift import triton_shift  # imports triton, which a CPU does not need

        shifted = triton_shift.token_shift(x, state, cu_seqlens)
    else:
        shifted = reference.token_shift(x, state, cu_seqlens)
    return shifted, reference.final_state(x, state, cu_seqlens) if output_final_state else None
