"""Linear attention with a decaying state: RetNet, Mamba2, GLA, HGRN2, LightNet, Rodimus, GSA, ABC, RWKV6 and plain."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.linear_attention.chunked import chunked
from flame.kernels.linear_attention.head_scale import check_factor, scale_heads
from flame.kernels.linear_attention.problem import make_problem
from flame.kernels.linear_attention.reference import recurrence
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["linear_attention", "linear_attention_step"]


def linear_attention(  # noqa: PLR0913 (one op for the whole family)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_decay: Tensor | None = None,
    scalar_decay: Tensor | None = None,
    key_decay: Tensor | None = None,
    value_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    value_scale: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``S_t = decay_t * S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t``, causal over the time axis.

    Args:
        q: [B, T, Hq, K], fp32, bf16 or fp16 (fp64 on the torch forms).
        k: [B, T, Hk, K].
        v: [B, T, Hv, V].
        head_decay: [H] log decay of a head, constant in time (RetNet).
        scalar_decay: [B, T, H] log decay of a head at a token (Mamba2, simple GLA).
        key_decay: [B, T, H, K] log decay of the state's rows (GLA, HGRN2, LightNet, Rodimus, RWKV6).
        value_decay: [B, T, H, V] log decay of the state's columns (first pass of GSA and ABC).
        bonus: [H, K], with key_decay: the read comes before the decay and the write, and sees the token itself through
            ``bonus``: ``o_t = scale * (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t`` (RWKV6).
        value_scale: [B, T, Hv] factor of v: ``value_scale_t v_t`` is written (Mamba2's step). The product is not kept for
            the backward, which makes it again.
        scale: factor of q, K ** -0.5 when None.
        initial_state: [N, H, K, V] fp32, N = B or the number of documents.
        output_final_state: also return the state after the last token, [N, H, K, V] fp32.
        cu_seqlens: [N + 1] int32 bounds of the documents packed into the one row of B = 1; their states never meet.
        backend: 'triton', 'chunked' or 'reference'; None chooses by device (see `select_backend`).
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    At most one decay may be given; decays are natural logarithms, <= 0, in any floating dtype. H is the largest head
    count; every other count divides it and head h uses head ``h // (H / Hx)`` of a tensor with Hx heads, which is never
    repeated in memory on the fast path. State and sums are fp32. Every tensor argument is differentiable, the final
    state too.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        FlameError: shapes that do not fit, or arguments that exclude each other.

    Papers: RetNet 2307.08621, GLA 2312.06635, Mamba2 2405.21060, HGRN2 2404.07904, GSA 2409.07146, RWKV6 2404.05892.
    """
    problem = make_problem(
        q,
        k,
        v,
        head_decay=head_decay,
        scalar_decay=scalar_decay,
        key_decay=key_decay,
        value_decay=value_decay,
        bonus=bonus,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    name = select_backend(q, backend, ("triton", "chunked", "reference"))
    fast = name == "triton" and problem.compute_dtype == torch.float32
    if value_scale is not None:
        if fast and shard is None:
            from flame.kernels.linear_attention import triton_scaled

            if triton_scaled.fits(problem):
                check_factor(v, value_scale)
                return triton_scaled.scaled_linear_attention(problem, value_scale, output_final_state)
        problem = replace(problem, v=scale_heads(v, value_scale, backend="triton" if fast else "chunked"))
    if shard is not None:
        from flame.kernels.linear_attention.sharded import sharded_linear_attention

        refuse_states("linear_attention", initial_state, output_final_state)
        return sharded_linear_attention(problem, shard, backend), None
    if fast:
        from flame.kernels.linear_attention.triton_op import linear_attention_triton

        return linear_attention_triton(problem, output_final_state)
    # One token is one step of the recurrence; padding it to a chunk would only waste the machine.
    if name == "reference" or (q.shape[1] == 1 and cu_seqlens is None and backend is None):
        o, final = recurrence(problem)
    else:
        o, final = chunked(problem)
    return o, final if output_final_state else None


def linear_attention_step(  # noqa: PLR0913 (one op for the whole family)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    head_decay: Tensor | None = None,
    scalar_decay: Tensor | None = None,
    key_decay: Tensor | None = None,
    value_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `linear_attention`, for decoding.

    q [B, Hq, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V] fp32; decays as in `linear_attention` without the time
    axis. Returns o [B, H, V] in v's dtype and the new state.
    """
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    scalar_decay, key_decay, value_decay = (
        None if x is None else x.unsqueeze(1) for x in (scalar_decay, key_decay, value_decay)
    )
    o, final = linear_attention(
        q,
        k,
        v,
        head_decay=head_decay,
        scalar_decay=scalar_decay,
        key_decay=key_decay,
        value_decay=value_decay,
        bonus=bonus,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        backend="reference",
    )
    if final is None:
        raise FlameError("linear_attention_step: the reference returned no state.")
    return o.squeeze(1), final
