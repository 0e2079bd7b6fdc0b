"""The parallel form in plain torch: matrix products inside chunks, a loop over chunks for the state.

With L the cumulative log decay since the chunk's start, row i reads ``exp(L_i)`` of the incoming state and
``exp(L_i - L_j)`` of row j <= i. A decay per channel cannot be factored as ``exp(L_i) exp(-L_j)`` over a chunk (the
second factor overflows under strong decay), so the chunk is halved again and again: rows of a right half meet those of
the left half through the pivot at the left half's end, where both exponents are <= 0, and only blocks of eight rows are
formed channel by channel. Nothing is clamped. Autograd gives the gradients. See GLA (Yang et al., 2312.06635).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flame.kernels.linear_attention.packing import ChunkTable, chunk_table, join, split
from flame.kernels.linear_attention.problem import Problem

CHUNK = 64
BLOCK = 8  # rows of the smallest diagonal block


def chunked(problem: Problem) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [N, H, K, V], as `reference.recurrence`."""
    p, tokens = problem, problem.q.shape[1]
    size = min(CHUNK, max(BLOCK, 1 << (tokens - 1).bit_length()))
    table = None if p.cu_seqlens is None else chunk_table(p.cu_seqlens, tokens, size)
    q, k, v = (split(x.to(p.compute_dtype), size, table) for x in (p.q * p.scale, p.k, p.v))
    q, k, v = (_repeat(x, p.heads) for x in (q, k, v)) if p.kind in ("key", "value") else (q, k, v)
    decay = _decay(p, size, table)
    total = None if decay is None else decay.cumsum(3)
    read = total - decay if p.bonus is not None and total is not None and decay is not None else total
    o = _intra(p, q, k, v, total, read)
    q, k, v = (_repeat(x, p.heads) for x in (q, k, v))
    before, final = _states(p, k, v, total, table)
    if read is not None and p.kind == "value":
        o = o + (q @ before) * read.exp()
    else:
        o = o + (q if read is None else q * read.exp()) @ before
    return join(o, tokens, table).to(p.v.dtype), final


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _decay(p: Problem, size: int, table: ChunkTable | None) -> Tensor | None:
    """Log decay [B, M, H, size, K | V | 1]."""
    if p.decay is None:
        return None
    decay = p.decay.to(p.compute_dtype)
    if p.kind == "head":
        decay = decay.expand(*p.q.shape[:2], -1)
    if p.kind in ("head", "scalar"):
        decay = decay.unsqueeze(-1)
    return _repeat(split(decay, size, table), p.heads)


def _intra(p: Problem, q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, read: Tensor | None) -> Tensor:
    """Contributions of a chunk's own rows, [B, M, H, size, V]."""
    if total is None or read is None:
        return _repeat(_products(q, k).tril(), p.heads) @ _repeat(v, p.heads)
    if p.kind == "key":
        return _key_scores(p, q, k, total, read) @ v
    if p.kind == "value":
        return _value_rows(q, k, v, total)
    return (_repeat(_products(q, k), p.heads) * _lower_exp(total - total.mT, 0)) @ _repeat(v, p.heads)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q_i . k_j, once per group when q and k share their heads (Mamba2's B and C)."""
    heads = max(q.shape[2], k.shape[2])
    return _repeat(q, heads) @ _repeat(k, heads).mT


def _lower_exp(exponent: Tensor, diagonal: int) -> Tensor:
    """exp below the diagonal of the two axes after the heads, 0 above: masked before exp, which would overflow."""
    keep = torch.ones(exponent.shape[3:5], dtype=torch.bool, device=exponent.device).tril(diagonal)
    keep = keep.view(*keep.shape, *(1,) * (exponent.dim() - 5))
    return exponent.masked_fill(~keep, float("-inf")).exp()


def _halves(size: int) -> Iterator[int]:
    """Half widths of the pivoted blocks, widest first."""
    half = size // 2
    while half >= BLOCK:
        yield half
        half //= 2


def _left_right(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves [..., size / 2 half, half, D] of every block of 2 half rows."""
    blocks = x.unflatten(3, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _key_scores(p: Problem, q: Tensor, k: Tensor, total: Tensor, read: Tensor) -> Tensor:
    """sum_c q_ic k_jc exp(read_i - total_j)_c for the rows j <= i that i reads, [B, M, H, size, size]."""
    size = q.shape[3]
    scores = q.new_zeros(*q.shape[:4], size)
    for half in _halves(size):
        left, right = _left_right(total, half)
        pivot = left[..., -1:, :]
        rows = _left_right(q, half)[1] * (_left_right(read, half)[1] - pivot).exp()
        columns = _left_right(k, half)[0] * (pivot - left).exp()
        scores = scores + _place(rows @ columns.mT, size, half)
    blocks = [x.unflatten(3, (-1, BLOCK)).flatten(2, 3) for x in (q, k, total, read)]
    bq, bk, bt, br = (x.flatten(0, 1).unsqueeze(0) for x in blocks)
    weight = _lower_exp(br.unsqueeze(-2) - bt.unsqueeze(-3), 0 if p.bonus is None else -1)
    diagonal = torch.einsum("xyhic,xyhjc,xyhijc->xyhij", bq, bk, weight)
    if p.bonus is not None:
        u = p.bonus.to(q).repeat_interleave(size // BLOCK, 0).unsqueeze(1)
        diagonal = diagonal + torch.diag_embed((bq * u * bk).sum(-1))
    diagonal = diagonal.view(*q.shape[:3], size // BLOCK, BLOCK, BLOCK)
    return scores + _block_diagonal(diagonal)


def _place(block: Tensor, size: int, half: int) -> Tensor:
    """[..., n, half, half] into the lower left quarters of the n diagonal blocks of [..., size, size]."""
    quarter = block.new_zeros(*block.shape[:-2], 2 * half, 2 * half)
    quarter[..., half:, :half] = block
    return _block_diagonal(quarter) if quarter.shape[-3] > 1 else quarter.squeeze(-3)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """[..., n, c, c] to [..., n c, n c]."""
    n, c = blocks.shape[-3], blocks.shape[-1]
    full = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
    return full.reshape(*blocks.shape[:-3], n * c, n * c)


def _value_rows(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """sum_{j <= i} (q_i . k_j) v_jc exp(total_i - total_j)_c, [B, M, H, size, V]."""
    scores = q @ k.mT
    size = q.shape[3]
    blocks = [x.unflatten(3, (-1, BLOCK)).flatten(2, 3) for x in (q, k, v, total)]
    bq, bk, bv, bt = (x.flatten(0, 1).unsqueeze(0) for x in blocks)
    weight = _lower_exp(bt.unsqueeze(-2) - bt.unsqueeze(-3), 0)
    o = torch.einsum("xyhij,xyhjc,xyhijc->xyhic", bq @ bk.mT, bv, weight).view_as(v)
    for half in _halves(size):
        left, right = _left_right(total, half)
        pivot = left[..., -1:, :]
        quarter = scores.unflatten(4, (-1, 2, half)).unflatten(3, (-1, 2, half))[..., 1, :, :, 0, :]
        block = torch.diagonal(quarter, dim1=3, dim2=5).movedim(-1, 3)
        rows = (block @ (_left_right(v, half)[0] * (pivot - left).exp())) * (right - pivot).exp()
        o = o + torch.stack([torch.zeros_like(rows), rows], 4).flatten(3, 5)
    return o


def _states(p: Problem, k: Tensor, v: Tensor, total: Tensor | None, table: ChunkTable | None) -> tuple[Tensor, Tensor]:
    """States before each chunk [B, M, H, K, V] and the final ones [N, H, K, V]."""
    factors: list[Tensor] | None = None
    if total is not None:
        remaining = (total[:, :, :, -1:] - total).exp()
        k, v = (k, v * remaining) if p.kind == "value" else (k * remaining, v)
        factor = total[:, :, :, -1].exp()
        factors = list((factor.unsqueeze(-2) if p.kind == "value" else factor.unsqueeze(-1)).unbind(1))
    updates = (k.mT @ v).unbind(1)
    initial = k.new_zeros(p.state_shape) if p.initial_state is None else p.initial_state.to(k.dtype)
    opening = initial if table is None else initial[table.document]
    before, after, state = [], [], initial[:1] if table is not None else initial
    for n, update in enumerate(updates):
        if table is not None:
            state = torch.where(table.first[n], opening[n : n + 1], state)
        before.append(state)
        state = update + (state if factors is None else factors[n] * state)
        after.append(state)
    if table is None:
        return torch.stack(before, 1), state
    final = torch.stack(after, 1)[0, table.last.clamp(min=0)]
    return torch.stack(before, 1), torch.where(table.empty.view(-1, 1, 1, 1), initial, final)
