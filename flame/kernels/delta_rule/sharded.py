"""Delta rules over a sequence that is cut into ranks.

A rank changes a state that comes in by a K x K matrix, the product of its tokens' transitions. The op is linear in values and
state together, so one call with K more value channels, all zero, that start from the identity gives everything at once: the
last K columns of its final state are that matrix, and those of its outputs are each token's query as the incoming state
sees it. They read the state that comes out of the one exchange in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.delta_rule.problem import Problem, compute_dtype, sequences
from flame.kernels.sequence import SequenceShard, closing_states, opening_states


def sharded_delta_rule(
    p: Problem, solve: Callable[[Problem], tuple[Tensor, Tensor]], steps: int, shard: SequenceShard
) -> Tensor:
    """o [B, T, H, V] of a problem without states, of which every `steps`-th row is read."""
    streams = p.q.shape[0] if p.cu_seqlens is None else shard.streams
    K, V, count = p.k.shape[-1], p.v.shape[-1], sequences(p)
    identity = F.pad(torch.eye(K, device=p.v.device, dtype=compute_dtype(p)), (V, 0))
    opening = opening_states(identity.expand(streams, p.heads, -1, -1), count).contiguous()
    both, final = solve(replace(p, v=F.pad(p.v, (0, K)), initial_state=opening))
    o, queries = both[:, steps - 1 :: steps].split([V, K], -1)
    update, transition = closing_states(final, streams).split([V, K], -1)
    if count > streams:  # the last document began here: nothing of an earlier one is left
        transition = torch.zeros_like(transition)
    incoming = shard.carry(update, transition, matrix=True).to(queries.dtype)
    if p.cu_seqlens is None or streams == 1:
        return o + (queries.transpose(1, 2) @ incoming).transpose(1, 2)
    for stream, state in enumerate(incoming):
        own = in_document(p.cu_seqlens, stream * (count // streams), p.q.shape[1])[steps - 1 :: steps]
        o = o + ((queries * own.view(-1, 1, 1)).transpose(1, 2) @ state).transpose(1, 2)
    return o


def in_document(cu_seqlens: Tensor, document: int, rows: int) -> Tensor:
    """[rows] bool: the rows of `document`, by its number."""
    row = torch.arange(rows, device=cu_seqlens.device)
    return (row >= cu_seqlens[document]) & (row < cu_seqlens[document + 1])
