"""Running log-normaliser gate of LightNet and ABC: a cumulative softmax written as a gated recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.log_gate.chunked import log_gate_chunked
from flame.kernels.log_gate.reference import log_gate_reference
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["log_gate", "log_gate_step"]


def log_gate(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`z_t = log(exp(z_{t-1}) + exp(x_t))`, giving the weight `exp(x_t - z_t)` and the log decay `z_{t-1} - z_t`.

    A linear-attention state with this weight on new entries and this decay on old ones holds the cumulative-softmax
    average of what was written. After an empty prefix (`z_{-1} = -inf`) the log decay is 0: there is nothing to decay.

    Args:
        x: logits, `[B, T, H, M]`.
        initial_state: normaliser so far, `[N, H, M]` fp32, -inf for none. Differentiable.
        output_final_state: also return the normaliser after the last token, `[N, H, M]` fp32. Differentiable.
        cu_seqlens: `[N + 1]` int32 document boundaries; then `B == 1` and the normaliser restarts at each.
        backend: 'triton', 'chunked' or 'reference'; None chooses.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        `(weight [B, T, H, M] in x.dtype, log_decay [B, T, H, M] fp32, final_state or None)`.

    Raises:
        FlameError: shapes that do not belong together, or packed documents with more than one row.

    Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024; Peng et al.,
    "ABC: Attention with Bounded-memory Control", 2022.
    """
    _check(x, initial_state, cu_seqlens)
    if shard is not None:
        from flame.kernels.log_gate.sharded import normalizer_before

        refuse_states("log_gate", initial_state, output_final_state)
        initial_state = normalizer_before(x, cu_seqlens, shard)
    chosen = select_backend(x, backend)
    if chosen == "triton":
        from flame.kernels.log_gate.triton_gate import log_gate_triton

        weight, log_decay, final = log_gate_triton(x, initial_state, cu_seqlens)
    elif chosen == "chunked":
        weight, log_decay, final = log_gate_chunked(x, initial_state, cu_seqlens)
    else:
        weight, log_decay, final = log_gate_reference(x, initial_state, cu_seqlens)
    return weight, log_decay, final if output_final_state else None


def _check(x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 4:
        raise FlameError(f"log_gate: x has shape {tuple(x.shape)}, expected [B, T, H, M].")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise FlameError(f"log_gate: packed documents (cu_seqlens) need batch 1, got {x.shape[0]}.")
    expected = (x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, *x.shape[2:])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise FlameError(f"log_gate: initial_state has shape {tuple(initial_state.shape)}, expected {expected}.")


def log_gate_step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One decode step: `x [N, 1, H, M]`, `state [N, H, M]` fp32 (-inf when empty); `(weight, log_decay, new state)`."""
    now = x[:, 0].to(torch.promote_types(x.dtype, torch.float32))
    after = torch.logaddexp(state, now)
    log_decay = torch.where(state > float("-inf"), state - after, 0.0)
    return (now - after).exp()[:, None].to(x.dtype), log_decay[:, None], after
