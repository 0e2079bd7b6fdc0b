"""The parallel form in plain torch: a triangular solve inside each chunk, a loop over chunks for the state.

Inside a chunk that starts from state S the pseudo-values Z (what each row really writes) solve a unit lower triangular
system: ``Z = U + W S``. The rest are matrix products. The system is solved by substitution in fp32: its inverse is well
scaled, but powers of it, as doubling schemes form them, overflow for correlated keys with beta near 2. Autograd gives the
gradients. See DeltaNet (Yang et al., 2406.06484) and Gated DeltaNet (2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.delta_rule.problem import (
    Problem,
    Tied,
    Untied,
    compute_dtype,
    initial_state,
    normalized,
    repeat_heads,
)
from flame.kernels.delta_rule.scores import BLOCK, scores
from flame.kernels.linear_attention.packing import ChunkTable, chunk_table, join, split

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """What is known of every chunk before its state: ``Z = U + W S``, ``o = Q S + P Z + own``,
    ``S' = factor S + write^T Z + update``.

    read Q, W, write [B, M, H, C, K]; U, own [B, M, H, C, V]; P [B, M, H, C, C]; factor [B, M, H, K | 1, 1] or None;
    update [B, M, H, K, V]. own and update are None where all writing goes through Z.
    """

    read: Tensor
    scores: Tensor
    U: Tensor
    W: Tensor
    write: Tensor
    factor: Tensor | None
    own: Tensor | None = None
    update: Tensor | None = None


def chunked(p: Problem) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [N, H, K, V], as `reference.recurrence`."""
    tokens = p.q.shape[1]
    if tokens == 0:
        return p.v.new_zeros(p.v.shape), initial_state(p)
    size = min(CHUNK, max(BLOCK, 1 << (tokens - 1).bit_length()))
    table = None if p.cu_seqlens is None else chunk_table(p.cu_seqlens, tokens, size)
    parts = tied_chunks(p, size, table) if isinstance(p, Tied) else untied_chunks(p, size, table)
    states, z, final = scan(parts, initial_state(p), table)
    o = parts.read @ states + parts.scores @ z
    o = o if parts.own is None else o + parts.own
    return join(o, tokens, table).to(p.v.dtype), final


def tied_chunks(p: Tied, size: int, table: ChunkTable | None) -> Chunks:
    n = normalized(p)
    q, k, v = (_split(x, p, size, table) for x in (n.q * n.scale, n.k, n.v))
    erase = k if n.erase is None else _split(n.erase, p, size, table)
    total, before = _cumulative(p.decay, p, size, table)
    at_read = before if p.exclusive else total
    system = scores(erase, k, at_read, total, strict=True)
    decayed_erase = _times_exp(erase, at_read)
    if n.beta is not None:
        beta = _split(n.beta.unsqueeze(-1), p, size, table)
        system, v, decayed_erase = beta * system, beta * v, beta * decayed_erase
    solved = _solve(system, torch.cat([v, -decayed_erase], -1))
    U, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    write, factor = _to_chunk_end(k, total)
    return Chunks(_times_exp(q, total), scores(q, k, total, total, strict=False), U, W, write, factor)


def untied_chunks(p: Untied, size: int, table: ChunkTable | None) -> Chunks:
    q, k, v, a, b = (_split(x, p, size, table) for x in (p.q * p.scale, p.k, p.v, p.a, p.b))
    total, before = _cumulative(p.decay, p, size, table)
    right = torch.cat([scores(a, k, before, total, strict=True) @ v, _times_exp(a, before)], -1)
    U, W = _solve(-scores(a, b, before, total, strict=True), right).split([v.shape[-1], k.shape[-1]], -1)
    write, factor = _to_chunk_end(b, total)
    return Chunks(
        _times_exp(q, total),
        scores(q, b, total, total, strict=False),
        U,
        W,
        write,
        factor,
        own=scores(q, k, total, total, strict=False) @ v,
        update=_to_chunk_end(k, total)[0].mT @ v,
    )


def _solve(strictly_lower: Tensor, right: Tensor) -> Tensor:
    """(I + L)^-1 right by forward substitution."""
    return torch.linalg.solve_triangular(strictly_lower, right, upper=False, unitriangular=True)


def _split(x: Tensor, p: Problem, size: int, table: ChunkTable | None) -> Tensor:
    """[B, T, Hx, D] to [B, M, H, C, D] in the compute dtype."""
    return split(repeat_heads(x.to(compute_dtype(p)), p.heads), size, table)


def _cumulative(
    decay: Tensor | None, p: Problem, size: int, table: ChunkTable | None
) -> tuple[Tensor | None, Tensor | None]:
    """Log decay since the chunk's start, up to and with each row, and up to the row before it: [B, M, H, C, 1 | K]."""
    if decay is None:
        return None, None
    log = _split(decay if decay.dim() == 4 else decay.unsqueeze(-1), p, size, table)
    total = log.cumsum(3)
    return total, total - log


def _times_exp(x: Tensor, log: Tensor | None) -> Tensor:
    return x if log is None else x * log.exp()


def _to_chunk_end(x: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows as the state at the chunk's end sees them, and the state's own factor [B, M, H, 1 | K, 1]."""
    if total is None:
        return x, None
    whole = total[:, :, :, -1:]
    return x * (whole - total).exp(), whole.exp().mT


def scan(c: Chunks, initial: Tensor, table: ChunkTable | None) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk [B, M, H, K, V], pseudo-values [B, M, H, C, V], final states [N, H, K, V]."""
    opening = initial if table is None else initial[table.document]
    state = initial if table is None else initial[:1]
    before, after, values = [], [], []
    for n in range(c.U.shape[1]):
        if table is not None:
            state = torch.where(table.first[n], opening[n : n + 1], state)
        before.append(state)
        z = c.U[:, n] + c.W[:, n] @ state
        values.append(z)
        state = state if c.factor is None else c.factor[:, n] * state
        state = state + c.write[:, n].mT @ z
        state = state if c.update is None else state + c.update[:, n]
        after.append(state)
    states, z = torch.stack(before, 1), torch.stack(values, 1)
    if table is None:
        return states, z, state
    final = torch.stack(after, 1)[0, table.last.clamp(min=0)]
    return states, z, torch.where(table.empty.view(-1, 1, 1, 1), initial, final)
