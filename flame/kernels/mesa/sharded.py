"""The two states before a rank's first token, where a sequence is cut into ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.linear_attention import linear_attention
from flame.kernels.mesa.problem import Problem
from flame.kernels.sequence import SequenceShard, closing_states, opening_states, wide


def states_before(p: Problem, shard: SequenceShard) -> tuple[Tensor, Tensor]:
    """Key states [N, H, K, K] and value states [N, H, K, V].

    The solver needs them from the start, so a first pass finds what this rank adds: plain linear attention, whose cost is a
    small part of the solver's.
    """
    k, v = wide(p.k), wide(p.v)
    _, final = linear_attention(
        k,
        wide(p.beta).unsqueeze(-1) * k,
        torch.cat([k, v], -1),
        scalar_decay=p.log_decay,
        output_final_state=True,
        cu_seqlens=p.cu_seqlens,
    )
    assert final is not None
    rows = len(p.q)
    whole = wide(p.log_decay).sum(1).exp()[:, :, None, None]
    incoming = shard.carry(closing_states(final, rows), whole if len(final) == rows else torch.zeros_like(whole))
    keys, values = opening_states(incoming, len(final)).split([k.shape[-1], v.shape[-1]], -1)
    return keys, values
