"""Elementwise gated recurrence (HGRN): every channel is its own leaky sum."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.elementwise_scan.chunked import elementwise_scan_chunked
from flame.kernels.elementwise_scan.reference import elementwise_scan_reference
from flame.kernels.sequence import SequenceShard, first_document, refuse_states, running_sum

__all__ = ["elementwise_scan", "elementwise_scan_step"]


def elementwise_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`h_t = exp(log_decay_t) * h_{t-1} + x_t`, channel by channel.

    Args:
        x: gated inputs, `[B, T, E]`.
        log_decay: natural-log forget gates, `<= 0`, `[B, T, E]`; any strength is safe.
        initial_state: `[N, E]` fp32, one for each row, or each document when packed. Differentiable.
        output_final_state: also return the states after the last token, `[N, E]` fp32. Differentiable.
        cu_seqlens: `[N + 1]` int32 document boundaries; then `B == 1` and no state crosses a boundary.
        backend: 'triton', 'chunked' or 'reference'; None chooses.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        `(h [B, T, E] in x.dtype, final_state or None)`. The scan runs in fp32 (fp64 for fp64 inputs on the torch
        backends).

    Raises:
        FlameError: shapes that do not belong together, or packed documents with more than one row.

    Qin, Yang and Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023.
    """
    _check(x, log_decay, initial_state, cu_seqlens)
    if shard is not None:
        refuse_states("elementwise_scan", initial_state, output_final_state)
        return _part(x, log_decay, cu_seqlens, backend, shard), None
    chosen = select_backend(x, backend)
    if chosen == "triton":
        from flame.kernels.elementwise_scan.triton_scan import elementwise_scan_triton

        h, final = elementwise_scan_triton(x, log_decay, initial_state, cu_seqlens)
    elif chosen == "chunked":
        h, final = elementwise_scan_chunked(x, log_decay, initial_state, cu_seqlens)
    else:
        h, final = elementwise_scan_reference(x, log_decay, initial_state, cu_seqlens)
    return h, final if output_final_state else None


def _part(x: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, backend: str | None, shard: SequenceShard) -> Tensor:
    """The scan from zero, plus what is left of the incoming state at each token of the first document."""
    h, final = elementwise_scan(x, log_decay, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend)
    assert final is not None
    left = running_sum(log_decay.to(final.dtype)).exp()
    first = first_document(x.shape[1], cu_seqlens, x.device)
    whole = left[:, -1] if len(final) == len(x) else torch.zeros_like(left[:, -1])
    incoming = shard.carry(final[-len(x) :], whole)
    left = left if first is None else left * first[:, None]
    return h + (left * incoming[:, None]).to(h.dtype)


def _check(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 3 or x.shape != log_decay.shape:
        raise FlameError(
            f"elementwise_scan: x {tuple(x.shape)} and log_decay {tuple(log_decay.shape)} must both be [B, T, E]."
        )
    if cu_seqlens is not None and x.shape[0] != 1:
        raise FlameError(f"elementwise_scan: packed documents (cu_seqlens) need batch 1, got {x.shape[0]}.")
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None and tuple(initial_state.shape) != (rows, x.shape[2]):
        raise FlameError(
            f"elementwise_scan: initial_state has shape {tuple(initial_state.shape)}, expected {(rows, x.shape[2])}."
        )


def elementwise_scan_step(x: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One decode step: `x`, `log_decay` `[N, 1, E]`, `state [N, E]` fp32; returns `(h [N, 1, E], new state)`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = log_decay[:, 0].to(dtype).exp() * state + x[:, 0].to(dtype)
    return state[:, None].to(x.dtype), state
