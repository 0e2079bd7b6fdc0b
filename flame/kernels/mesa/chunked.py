"""The parallel form: states at the chunks' starts only; a row's matrix is applied through its chunk's keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.linear_attention.packing import ChunkTable, chunk_table, join, split
from flame.kernels.mesa.problem import Problem
from flame.kernels.mesa.solver import solve

CHUNK = 64


def chunked(p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o [B, T, H, V] in v's dtype and the final states [N, H, K, K], [N, H, K, V], as `reference.recurrence`."""
    tokens, dtype = p.q.shape[1], p.compute_dtype
    K, V = p.k.shape[-1], p.v.shape[-1]
    size = min(CHUNK, max(8, 1 << max(tokens - 1, 0).bit_length()))
    table = None if p.cu_seqlens is None else chunk_table(p.cu_seqlens, tokens, size)
    log, beta = (split(x.to(dtype).unsqueeze(-1), size, table) for x in (p.log_decay, p.beta))
    q, k, v = (split(x.to(dtype), size, table) for x in (p.q, p.k, p.v))
    total = log.cumsum(3)  # [B, M, H, C, 1]
    states, final = _states(p, beta * k, torch.cat([k, v], -1), total, table)
    keys, values = states.split([K, V], -1)
    weight = _lower_exp(total - total.mT) * beta.mT  # what row i sees of row j's write
    read, ridge = total.exp(), p.regularizer.to(dtype).unsqueeze(-2)

    def operator(x: Tensor) -> Tensor:
        return (read * x) @ keys.mT + ((x @ k.mT) * weight) @ k + ridge * x

    x = solve(operator, q, p.steps, p.scale_gradient)
    o = (read * x) @ values + ((x @ k.mT) * weight) @ v
    return join(o, tokens, table).to(p.v.dtype), (final[..., :K], final[..., K:])


def _lower_exp(exponent: Tensor) -> Tensor:
    """exp on and below the diagonal, 0 above: masked before exp, which would overflow."""
    keep = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).tril()
    return exponent.masked_fill(~keep, float("-inf")).exp()


def _states(
    p: Problem, rows: Tensor, columns: Tensor, total: Tensor, table: ChunkTable | None
) -> tuple[Tensor, Tensor]:
    """Both states side by side, [B, M, H, K, K + V] before each chunk and [N, H, K, K + V] at the end."""
    whole = total[:, :, :, -1:]
    updates = ((rows * (whole - total).exp()).mT @ columns).unbind(1)
    factors = whole.exp().unbind(1)
    initial = torch.cat(p.initial_states(), -1)
    opening = initial if table is None else initial[table.document]
    state = initial if table is None else initial[:1]
    before, after = [], []
    for n, (update, factor) in enumerate(zip(updates, factors)):
        if table is not None:
            state = torch.where(table.first[n], opening[n : n + 1], state)
        before.append(state)
        state = factor * state + update
        after.append(state)
    if table is None:
        return torch.stack(before, 1), state
    final = torch.stack(after, 1)[0, table.last.clamp(min=0)]
    return torch.stack(before, 1), torch.where(table.empty.view(-1, 1, 1, 1), initial, final)
