"""The parallel form in plain torch: dense levels inside chunks, log2(T / C) batched passes for the levels between them.

Each chunk is an affine map of the states that enter it: ``S -> M S + X`` with M a number (decay) or [K, K] (delta rule).
Doubling gives the maps of all runs of 2^j chunks, and the chunk at position p of its document reads, for every set bit j of
p, the run of 2^j chunks that this bit names, moved on by the runs of the lower bits: its rows meet those first. Nothing is
sequential over chunks. See Log-Linear Attention (Guo et al., 2506.04761).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.linear_attention.packing import ChunkTable, join, split
from flame.kernels.log_linear_attention.problem import LevelStates, Problem, bit_length, level_table

CHUNK = 64  # a power of two: levels up to log2(CHUNK) + 1 lie inside a chunk


@dataclass(frozen=True)
class Chunks:
    """Every chunk without its neighbours.

    scores [B, M, H, C, C]: what row i reads of row j's value, before its level's weight. read [B, M, H, C, K]: rows as they
    meet the state that enters. transition [B, M, H, K | 1, K | 1]. writes [B, M, H, C, K]: what each row's value is written
    under, moved on to the chunk's end. v [B, M, H, C, V]. weights [B, M, H, C, L].
    """

    scores: Tensor
    read: Tensor
    transition: Tensor
    writes: Tensor
    v: Tensor
    weights: Tensor


def chunked(p: Problem, final: bool) -> tuple[Tensor, LevelStates | None]:
    """o [B, T, H, V] in v's dtype and, if asked for, the final states; as `reference.recurrence` without initial states."""
    tokens = p.q.shape[1]
    size = min(CHUNK, max(8, 1 << max(tokens - 1, 0).bit_length()))
    table = None if p.cu_seqlens is None else open_chunk_table(p.cu_seqlens, tokens, size)
    chunks = make_chunks(p, size, table, open_end=final)
    levels = level_table(size, p.levels, p.q.device).expand(*chunks.scores.shape)
    o = (chunks.scores * chunks.weights.gather(-1, levels)) @ chunks.v
    positions = chunk_positions(chunks.v.shape[1], p.q.device, table)
    update = chunks.writes.mT @ chunks.v
    index = torch.arange(len(positions), device=positions.device)
    for level, read in enumerate(level_reads(chunks, update, chunks.read, index, positions)):
        at = min(level + size.bit_length(), p.levels - 1)
        o = o + chunks.weights[..., at : at + 1] * read
    o = join(o, tokens, table).to(p.v.dtype)
    return o, final_states(p, chunks, update, table, positions) if final else None


def open_chunk_table(cu_seqlens: Tensor, tokens: int, size: int) -> ChunkTable:
    """Like `packing.chunk_table`, but a document of n tokens has n // size + 1 chunks: its last is never full."""
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    counts = lengths // size + 1
    ends = counts.cumsum(0)
    index = torch.arange(tokens // size + lengths.numel(), device=bounds.device)
    document = torch.searchsorted(ends, index, right=True).clamp(max=lengths.numel() - 1)
    position = index - (ends - counts)[document]
    offset = position[:, None] * size + torch.arange(size, device=bounds.device)
    inside = (offset < lengths[document, None]) & (index < ends[-1])[:, None]
    token = torch.where(inside, bounds[document, None] + offset, tokens)
    return ChunkTable(token, position == 0, document, ends - 1, lengths == 0)


def chunk_positions(count: int, device: torch.device, table: ChunkTable | None) -> Tensor:
    """[M] index of every chunk in its document."""
    index = torch.arange(count, device=device)
    if table is None:
        return index
    return index - torch.where(table.first, index, 0).cummax(0).values


def make_chunks(p: Problem, size: int, table: ChunkTable | None, open_end: bool) -> Chunks:
    def cut(x: Tensor) -> Tensor:
        if table is None and open_end and x.shape[1] % size == 0:
            x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        return split(x, size, table)

    q, k, v = (cut(p.wide(x)) for x in (p.q, p.k, p.v))
    # Strong decays make sums whose small differences need more digits than fp32 has.
    total = cut(p.log_decay.unsqueeze(-1)).double().cumsum(3)  # [B, M, H, C, 1]
    keep = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).to(q.dtype).masked_fill(~keep, float("-inf")).exp()
    since, until, whole = (x.to(q.dtype).exp() for x in (total, total[:, :, :, -1:] - total, total[:, :, :, -1:]))
    scores = (q * p.scale) @ k.mT * decay
    read, writes, transition = q * p.scale * since, k * until, whole
    if p.beta is not None:
        beta = cut(p.beta.to(p.compute_dtype).unsqueeze(-1))
        system = (beta * (k @ k.mT) * decay).tril(-1)
        identity = torch.eye(size, dtype=q.dtype, device=q.device)
        solved = torch.linalg.solve_triangular(system, (identity * beta).contiguous(), upper=False, unitriangular=True)
        erased = solved @ (k * since)
        read = read - scores @ erased
        transition = transition * torch.eye(k.shape[-1], dtype=q.dtype, device=q.device) - writes.mT @ erased
        scores, writes = scores @ solved, solved.mT @ writes
    return Chunks(scores, read, transition, writes, v, cut(p.weights.to(p.compute_dtype)))


def level_reads(c: Chunks, update: Tensor, read: Tensor, index: Tensor, positions: Tensor) -> list[Tensor]:
    """What rows `read` [B, R, H, *, K | 1], which enter chunks `index` [R], find in the blocks of 1, 2, 4.. chunks that
    the bits of these chunks' positions name: one [B, R, H, *, V] a level, zero where the bit is not set."""
    run, move, found = update, c.transition, []
    position = positions[index]
    for level in range((positions.shape[0] - 1).bit_length()):
        step = 1 << level
        there = ((position >> level) & 1).bool().view(1, -1, 1, 1, 1)
        last = (index - (position & (step - 1)) - 1).clamp(min=0)  # the block's last chunk
        found.append(torch.where(there, _apply(read, run[:, last]), 0.0))
        read = torch.where(there, _apply(read, move[:, last]), read)
        # Runs that begin before their document are formed too, and never read.
        run = torch.cat([run[:, :step], run[:, step:] + _apply(move[:, step:], run[:, :-step])], 1)
        move = torch.cat([move[:, :step], _apply(move[:, step:], move[:, :-step])], 1)
    return found


def _apply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, where either may be a number [.., 1, 1] for a multiple of the identity."""
    return left * right if 1 in (left.shape[-1], right.shape[-2]) else left @ right


def final_states(p: Problem, c: Chunks, update: Tensor, table: ChunkTable | None, positions: Tensor) -> LevelStates:
    """The states after every document, whose last chunk is not full: blocks of earlier chunks moved to its end, and blocks
    of its own rows."""
    B, M, H, C, V = c.v.shape
    if table is None:
        index = torch.full((1,), M - 1, device=c.v.device)
        count = torch.full((B,), p.q.shape[1], dtype=torch.int64, device=c.v.device)
    else:
        index = table.last
        count = (p.cu_seqlens[1:] - p.cu_seqlens[:-1]).long()  # type: ignore[index]
    row = torch.arange(C, device=c.v.device)
    slot_of_row = (
        bit_length(row ^ (count[: len(index), None] % C)) - 1
    )  # [N, C]; -1 and rows past the end write nothing
    slots: list[Tensor] = []
    for slot in range(C.bit_length() - 1):
        writes = c.writes[:, index] * (slot_of_row == slot).view(1, -1, 1, C, 1)
        slots.append(writes.mT @ c.v[:, index])
    moved = c.transition[:, index]
    slots += level_reads(c, update, moved, index, positions)
    kept = slots[: p.levels - 1] + [torch.zeros_like(slots[0])] * (p.levels - 1 - len(slots))
    for older in slots[p.levels - 1 :]:
        kept[-1] = kept[-1] + older
    states = torch.stack(kept, 3)  # [B, 1, H, J, K, V] or [1, N, H, J, K, V]
    return LevelStates(states.flatten(0, 1).transpose(1, 2), count)
