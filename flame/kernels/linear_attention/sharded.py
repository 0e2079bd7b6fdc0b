"""Linear attention over a sequence that is cut into ranks.

Every rank computes its outputs as if its first document began here, while it learns what it does to a state that comes in:
a decay, diagonal. The states meet in one exchange, and the incoming one adds ``scale * (decay since the rank's start * q)^T
S_in`` to the outputs of the first document: one matrix product, where a second pass over the tokens would double the op.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.linear_attention import linear_attention
from flame.kernels.linear_attention.problem import Problem
from flame.kernels.sequence import SequenceShard, closing_states, first_document, running_sum, wide


@dataclass(frozen=True)
class Decays:
    """Log decay since the rank's start, [B, T, Hd, 1 | K | V]: at the read of a token, and after the last one [B, Hd, .]."""

    read: Tensor
    whole: Tensor


def sharded_linear_attention(p: Problem, shard: SequenceShard, backend: str | None) -> Tensor:
    """o [B, T, H, V] of a validated problem without states.

    Raises:
        FlameError: documents in several streams.
    """
    if shard.streams != 1:
        raise FlameError("linear_attention: a sequence shard of several streams is for delta rules only.")
    options = {f"{p.kind}_decay": p.decay} if p.decay is not None else {}
    o, final = linear_attention(
        p.q, p.k, p.v, bonus=p.bonus, scale=p.scale, output_final_state=True, cu_seqlens=p.cu_seqlens, backend=backend,
        **options,
    )  # fmt: skip
    assert final is not None
    rows = p.q.shape[0]
    decays = cumulative_decays(p)
    incoming = shard.carry(closing_states(final, rows), whole_factor(p, decays, final))
    return o + read_incoming(p, decays, incoming).to(o.dtype)


def cumulative_decays(p: Problem) -> Decays | None:
    """None without decay."""
    if p.decay is None:
        return None
    decay = wide(p.decay)
    if p.kind == "head":
        steps = torch.arange(1, p.q.shape[1] + 1, device=decay.device)
        total = (steps[:, None] * decay)[None, :, :, None]
    else:
        decay = decay if decay.dim() == 4 else decay.unsqueeze(-1)
        total = running_sum(decay)
    return Decays(total if p.bonus is None else total - decay, total[:, -1])


def whole_factor(p: Problem, decays: Decays | None, final: Tensor) -> Tensor:
    """What this rank does to an incoming state: [B, H, 1 | K, 1 | V], zero if a document begins here."""
    if decays is None:
        factor = final.new_ones(p.q.shape[0], p.heads, 1, 1)
    else:
        factor = to_heads(decays.whole.exp(), p.heads, 1).expand(p.q.shape[0], -1, -1)
        factor = factor.unsqueeze(-2) if p.kind == "value" else factor.unsqueeze(-1)
    return factor if p.sequences == p.q.shape[0] else torch.zeros_like(factor)


def read_incoming(p: Problem, decays: Decays | None, state: Tensor) -> Tensor:
    """What the first documents' queries read of the state [B, H, K, V] that came in: [B, T, H, V]."""
    dtype = p.v.dtype
    first = first_document(p.q.shape[1], p.cu_seqlens, p.q.device)
    weight = None if decays is None else decays.read.exp()
    if first is not None:
        kept = first.view(-1, 1, 1).to(state.dtype)
        weight = kept if weight is None else weight * kept
    q = p.q.to(dtype)
    if p.kind == "key" and weight is not None:
        heads = max(q.shape[2], weight.shape[2])
        q = (to_heads(q, heads, 2) * to_heads(weight, heads, 2)).to(dtype)
    o = grouped_read(q, (state * p.scale).to(dtype))
    if p.kind == "key" or weight is None:
        return o
    return o * to_heads(weight.to(dtype), p.heads, -2)


def grouped_read(q: Tensor, state: Tensor) -> Tensor:
    """q [B, T, Hq, K], state [B, H, K, V] -> [B, T, H, V]; heads that share a query are columns of one product."""
    B, H, K, V = state.shape
    groups = q.shape[2]
    columns = state.view(B, groups, H // groups, K, V).transpose(2, 3).reshape(B, groups, K, -1)
    return (q.transpose(1, 2) @ columns).transpose(1, 2).reshape(B, q.shape[1], H, V)


def to_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Head h of the result is h // (heads / Hx) of x's along `dim`."""
    return x if x.shape[dim] in (1, heads) else x.repeat_interleave(heads // x.shape[dim], dim)
