"""The parallel form for GPUs: a tree of blocks whose parts are attention without masks, by the tiled kernels.

A block knows its queries moved to before it, its keys moved to its end and its product of reflections `I - E`. Up to 8
neighbours join: the queries of each visit the keys of those before it, nearest first, taking on one product after another,
and what they see is merged by its normalizer. Eight blocks of 64 tokens make one of 512, then 4096: a query is moved once
for every part instead of once for every 64 keys.

The backward builds the tree anew and, as every part's weights follow from the whole normalizer, needs of the forward
only the output and that. Heads are taken a few at a time, so that memory beside inputs and outputs is bounded.

Gates and document boundaries are biases: a key's is the gates from it to the end of its block, a query's the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.path_attention.base import Base, base_gradients, make_base
from flame.kernels.path_attention.parts import LOG2E, Parts
from flame.kernels.path_attention.problem import Problem

BASE = 64
FAN = 8
APART = 1e4  # what a document boundary takes off a score
SCRATCH = 1 << 27  # bytes of one wide tensor [rows, T, K]; about fifteen live at once


@dataclass(frozen=True)
class Level:
    """M blocks of S tokens in n rows (a head of a batch row each): q, k `[n, M, S, K]` moved to the blocks' ends; e
    `[n, M, K, K]` wide, with which a block moves a row by ``q - q e``."""

    q: Tensor
    k: Tensor
    e: Tensor

    @property
    def fan(self) -> int:
        """How many neighbours join."""
        return min(FAN, self.q.shape[1])


@dataclass(frozen=True)
class Heads:
    """The rows of a few key heads and the query heads that read them; T is padded to whole groups of blocks.

    q, k `[n, T, K]`, v `[n, T, V]`; w wide `[n, T, K]`, beta wide `[n, T]`; gates `[n, T]` fp64: running sums in base 2, or
    None. at: the heads of q and of k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    gates: Tensor | None
    at: tuple[slice, slice]


def padded_blocks(tokens: int) -> int:
    """Blocks of BASE tokens for `tokens`, such that every level joins whole groups."""
    blocks, unit = max(1, -(-tokens // BASE)), 1
    while blocks > FAN:
        blocks, unit = -(-blocks // FAN), unit * FAN
    return blocks * unit


def heads_of(p: Problem) -> Iterator[Heads]:
    """All heads of a problem, as many at a time as SCRATCH allows."""
    B, T, H, K = p.q.shape
    Hk, length = p.k.shape[2], padded_blocks(T) * BASE
    each, gates = H // Hk, running_gates(p)
    count = max(1, SCRATCH // (4 * B * length * K * each))
    wide = torch.promote_types(p.q.dtype, torch.float32)

    def rows(x: Tensor, of: slice, copies: int = 1) -> Tensor:  # [B, T, Hx, ..] -> [n, T, ..]
        x = x[:, :, of].repeat_interleave(copies, 2) if copies > 1 else x[:, :, of]
        return _pad(x.transpose(1, 2), 2, length).flatten(0, 1)

    for first in range(0, Hk, count):
        of_k = slice(first, min(first + count, Hk))
        of_q = slice(of_k.start * each, of_k.stop * each)
        k, v, w, beta = (rows(x, of_k, each) for x in (p.k, p.v, p.w.to(wide), p.beta.to(wide)))
        gated = None if gates is None else rows(gates, of_q)
        yield Heads(rows(p.q, of_q), k, v, w, beta, gated, (of_q, of_k))


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    """x with zeros up to `length` on one axis."""
    missing = length - x.shape[axis]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, missing))


def running_gates(p: Problem) -> Tensor | None:
    """[B, T, H] fp64, base 2. Documents are kept apart by gates that let nothing through at their first tokens."""
    if p.log_forget is None and p.cu_seqlens is None:
        return None
    B, T, H, _ = p.q.shape
    steps = p.q.new_zeros(B, T, H, dtype=torch.float64) if p.log_forget is None else p.log_forget.double() * p.scale
    if p.cu_seqlens is not None:
        starts = steps.new_zeros(T + 1).index_fill(0, p.cu_seqlens.long(), -APART)[:T]
        steps = steps + starts[:, None]
    return steps.cumsum(1) * LOG2E


def forward(p: Problem, parts: Parts) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and, base 2 and padded, the log of every query's softmax sum `[B, H, T]`."""
    B, T, H, _ = p.q.shape
    wide = torch.promote_types(p.q.dtype, torch.float32)
    o, lse = p.q.new_empty(B, T, H, p.v.shape[3]), p.q.new_empty(B, H, padded_blocks(T) * BASE, dtype=wide)
    for heads in heads_of(p):
        base = _base(heads, parts)
        out, norm = _attend_inside(base, heads, p.scale)
        level = _lowest(base, heads)
        del base
        while level.q.shape[1] > 1:
            level, out, norm = _join(level, heads, out, norm, p.scale, parts)
        o[:, :, heads.at[0]] = out.unflatten(0, (B, -1))[:, :, :T].transpose(1, 2)
        lse[:, heads.at[0]] = norm.unflatten(0, (B, -1))
    return o, lse


def _base(heads: Heads, parts: Parts) -> Base:
    def blocks(x: Tensor) -> Tensor:
        return x.to(heads.w.dtype).unflatten(1, (-1, BASE)).flatten(0, 1)

    return make_base(blocks(heads.q), blocks(heads.k), blocks(heads.w), blocks(heads.beta), parts.inverse)


def _lowest(base: Base, heads: Heads) -> Level:
    n, dtype = heads.q.shape[0], heads.q.dtype
    q, k, e = (x.unflatten(0, (n, -1)) for x in (base.q_before.to(dtype), base.k_end.to(dtype), base.e))
    return Level(q, k, e)


def _inside(base: Base, heads: Heads, scale: float) -> Tensor:
    """Base-2 scores inside the blocks `[n * M, C, C]`, wide; -inf where a key is later than the query."""
    scores = base.local * (scale * LOG2E)
    if heads.gates is not None:
        gates = heads.gates.unflatten(1, (-1, BASE)).flatten(0, 1)
        scores = scores + (gates.unsqueeze(-1) - gates.unsqueeze(-2)).to(scores.dtype)
    hidden = torch.ones(BASE, BASE, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(hidden, -torch.inf)


def _attend_inside(base: Base, heads: Heads, scale: float) -> tuple[Tensor, Tensor]:
    """What queries see of their own blocks: output `[n, T, V]` and base-2 normalizer `[n, T]`, wide."""
    n, scores = heads.q.shape[0], _inside(base, heads, scale)
    lse = torch.logsumexp(scores / LOG2E, -1) * LOG2E
    o = torch.exp2(scores - lse.unsqueeze(-1)).to(heads.v.dtype) @ heads.v.unflatten(1, (-1, BASE)).flatten(0, 1)
    return o.to(scores.dtype).unflatten(0, (n, -1)).flatten(1, 2), lse.unflatten(0, (n, -1)).flatten(1, 2)


def _gather(x: Tensor, level: Level) -> Tensor:
    """[n, T, ..] or [n, M, ..] -> [fan, n * groups, ..]: the blocks of one place in their groups together."""
    M, fan = level.q.shape[1], level.fan
    x = x if x.shape[1] == M else x.unflatten(1, (M, -1))
    return x.unflatten(1, (M // fan, fan)).movedim(2, 0).flatten(1, 2).contiguous()


def _scatter(x: Tensor, level: Level) -> Tensor:
    """[fan, n * groups, S, ..] -> [n, groups, fan * S, ..]."""
    return x.unflatten(1, (level.q.shape[0], -1)).movedim(0, 2).flatten(2, 3)


def _biases(heads: Heads, level: Level) -> tuple[Tensor, Tensor] | None:
    """Gates of gathered blocks fp64 [fan, N, S], and the wide biases of keys, up to the ends of their blocks."""
    if heads.gates is None:
        return None
    gates = _gather(heads.gates, level)
    return gates, (gates[..., -1:] - gates).to(heads.w.dtype)


def _since(gates: Tensor, distance: int, like: Tensor) -> Tensor:
    """Gates from the end of the block at `distance` before each block to its queries [fan - distance, N, S]."""
    return (gates[distance:] - gates[: gates.shape[0] - distance, :, -1:]).to(like.dtype)


def _join(
    level: Level, heads: Heads, o: Tensor, lse: Tensor, scale: float, parts: Parts
) -> tuple[Level, Tensor, Tensor]:
    """Groups of up to FAN neighbours as blocks of the next level; o `[n, T, V]` and lse `[n, T]` with what they see."""
    q, k, e = (_gather(x, level) for x in (level.q, level.k, level.e))
    v, o, lse = (_gather(x, level) for x in (heads.v, o, lse))
    biases, fan = _biases(heads, level), level.fan
    arrived = [q[0]]
    for distance, running in _visits(q, e, arrived):
        count = fan - distance
        bias = None if biases is None else biases[1][:count].flatten(0, 1)
        seen, norm = parts.attend(running.flatten(0, 1), k[:count].flatten(0, 1), v[:count].flatten(0, 1), bias, scale)
        norm = norm.unflatten(0, (count, -1))
        if biases is not None:
            norm = norm + _since(biases[0], distance, norm)
        parts.merge(o[distance:], lse[distance:], seen.unflatten(0, (count, -1)), norm)
    o, lse = _scatter(o, level).flatten(1, 2), _scatter(lse, level).flatten(1, 2)
    return _next_level(level, arrived, k, e), o, lse


def _visits(q: Tensor, e: Tensor, arrived: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(distance, the queries of the blocks from `distance` on, moved to the end of the block they visit). `arrived` gets
    each block's queries once they have passed all before."""
    running, fan = q, q.shape[0]
    for distance in range(1, fan):
        running = running[1:]
        yield distance, running
        running = _move(running, e[: fan - distance])
        arrived.append(running[0])


def _next_level(level: Level, arrived: list[Tensor], k: Tensor, e: Tensor) -> Level:
    if level.fan == level.q.shape[1]:  # the root has no use for them
        return Level(level.q[:, :1], level.k[:, :1], level.e[:, :1])
    keys = torch.stack([stage[-1] for stage in _transports(k, e)][::-1])
    product = _products(e)[-1].unflatten(0, (level.q.shape[0], -1))
    return Level(_scatter(torch.stack(arrived), level), _scatter(keys, level), product)


def _move(x: Tensor, e: Tensor) -> Tensor:
    """x - x e for stacks of rows [c, N, S, K] and [c, N, K, K], rounded once."""
    flat = x.flatten(0, 1)
    return torch.baddbmm(flat, flat, e.flatten(0, 1).to(x.dtype), alpha=-1).unflatten(0, x.shape[:2])


def _transports(k: Tensor, e: Tensor) -> list[Tensor]:
    """Keys [fan, N, S, K] past 0, 1, .. fan - 1 blocks: stage d holds those of the first fan - d blocks, the last finished."""
    stages = [k]
    for distance in range(1, k.shape[0]):
        stages.append(_move(stages[-1][:-1], e[distance:].mT))
    return stages


def _products(e: Tensor) -> list[Tensor]:
    """E of the last block, of the last two, ..: a query passes its last block first, ``(I - e_last) .. (I - e_first)``."""
    totals = [e[-1]]
    for other in e[:-1].flip(0).unbind(0):
        totals.append(torch.baddbmm(totals[-1] + other, totals[-1], other, alpha=-1))
    return totals


def backward(p: Problem, o: Tensor, lse: Tensor, do: Tensor, parts: Parts) -> dict[str, Tensor]:
    """Gradients of q, k, v, w, beta and, by the name `gates` and natural, of the running sums of gates `[B, H, T]`."""
    (B, T, H, _), Hk, wide = p.q.shape, p.k.shape[2], lse.dtype
    inputs = {"q": p.q, "k": p.k, "v": p.v, "w": p.w, "beta": p.beta}
    out = {name: x.new_empty(x.shape) for name, x in inputs.items()}
    if p.log_forget is not None:
        out["gates"] = lse.new_empty(B, H, T)
    for heads in heads_of(p):
        rows = (_rows(o, heads, lse), _rows(do, heads, lse), lse[:, heads.at[0]].flatten(0, 1))
        got, dgates = _Backward(heads, rows, p.scale, parts).run()
        for name, x in zip(inputs, got):
            x = x.unflatten(0, (B, -1))[:, :, :T]  # [B, heads, T, ..]
            if name != "q" and Hk != H:
                x = x.unflatten(1, (-1, H // Hk)).sum(2)
            out[name][:, :, heads.at[name != "q"]] = x.transpose(1, 2).to(out[name].dtype)
        if p.log_forget is not None and dgates is not None:
            out["gates"][:, heads.at[0]] = dgates.unflatten(0, (B, -1))[:, :, :T].to(wide)
    return out


def _rows(x: Tensor, heads: Heads, lse: Tensor) -> Tensor:
    """x [B, T, H, V] as the padded rows of some heads."""
    return _pad(x[:, :, heads.at[0]].transpose(1, 2), 2, lse.shape[2]).flatten(0, 1)


class _Backward:
    """One pass over the tree of some heads, from the root down. rows: output, its gradient, and base-2 normalizer."""

    def __init__(self, heads: Heads, rows: tuple[Tensor, Tensor, Tensor], scale: float, parts: Parts) -> None:
        self.heads, self.rows, self.scale, self.parts = heads, rows, scale, parts
        self.dv = torch.zeros_like(heads.v, dtype=heads.w.dtype)
        self.dgates = None if heads.gates is None else torch.zeros_like(rows[2])

    def run(self) -> tuple[list[Tensor], Tensor | None]:
        """dq, dk, dv, dw, dbeta of the rows, and the gradient of the natural running sums of gates."""
        base = _base(self.heads, self.parts)
        levels = [_lowest(base, self.heads)]
        while levels[-1].fan < levels[-1].q.shape[1]:
            level = levels[-1]
            q, k, e = (_gather(x, level) for x in (level.q, level.k, level.e))
            arrived = [q[0]]
            for _ in _visits(q, e, arrived):
                pass
            levels.append(_next_level(level, arrived, k, e))
        above: tuple[Tensor, Tensor, Tensor] | None = None
        while levels:
            above = self.through(levels.pop(), above)
        assert above is not None
        dlocal = self.inside(base)
        dq, dk, de = (x.flatten(0, 1).to(base.q.dtype) for x in above)
        dq, dk, dw, dbeta = base_gradients(base, dlocal, dq, dk, de)
        n = self.heads.q.shape[0]
        dq, dk, dw = (x.unflatten(0, (n, -1)).flatten(1, 2) for x in (dq, dk, dw))
        return [dq, dk, self.dv, dw, dbeta.unflatten(0, (n, -1)).flatten(1, 2)], self.dgates

    def inside(self, base: Base) -> Tensor:
        """Gradient of the products inside the blocks `[n * M, C, C]`; adds to dv and the gates."""
        o, do, lse, v, dv = (x.unflatten(1, (-1, BASE)).flatten(0, 1) for x in (*self.rows, self.heads.v, self.dv))
        wide = lse.dtype
        p = torch.exp2(_inside(base, self.heads, self.scale) - lse.unsqueeze(-1))
        delta = (o.to(wide) * do.to(wide)).sum(-1, keepdim=True)
        ds = p * (do.to(wide) @ v.to(wide).mT - delta)
        dv.add_(p.to(do.dtype).mT @ do)  # a view of self.dv
        if self.dgates is not None:
            self.dgates.add_((ds.sum(-1) - ds.sum(-2)).view_as(self.dgates))
        return ds * self.scale

    def through(self, level: Level, above: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a level's q, k [n, M, S, K] and e [n, M, K, K], given those of the level that it joins to."""
        q, k, e = (_gather(x, level) for x in (level.q, level.k, level.e))
        dk, de = torch.zeros_like(k, dtype=e.dtype), torch.zeros_like(e)
        arrived = None
        if above is not None:
            arrived, finished = (x.unflatten(2, (level.fan, -1)).movedim(2, 0).flatten(1, 2) for x in above[:2])
            _untransport(k, e, finished.to(k.dtype), dk, de)
            _unmultiply(e, above[2].flatten(0, 1), de)
        dq = self.unvisit(level, (q, k, e), arrived, dk, de)
        dq, dk, de = (x.unflatten(1, (level.q.shape[0], -1)).movedim(0, 2).flatten(1, 2) for x in (dq, dk, de))
        return dq, dk, de

    def unvisit(
        self, level: Level, tensors: tuple[Tensor, Tensor, Tensor], arrived: Tensor | None, dk: Tensor, de: Tensor
    ) -> Tensor:
        """dq of gathered blocks [fan, N, S, K]; adds to dk, de, dv and the gates."""
        (q, k, e), fan, scale = tensors, level.fan, self.scale
        v, *rows = (_gather(x, level) for x in (self.heads.v, *self.rows))
        biases = _biases(self.heads, level)
        dv, columns, totals = torch.zeros_like(v, dtype=dk.dtype), *(torch.zeros_like(rows[2]) for _ in range(2))
        visits = list(_visits(q, e, []))
        grad: Tensor | None = None if arrived is None else arrived[fan - 1 :].to(q.dtype)
        for distance, running in reversed(visits):
            count = fan - distance
            o, do, lse = (x[distance:].flatten(0, 1) for x in rows)
            bias = None
            if biases is not None:
                bias = biases[1][:count].flatten(0, 1)
                lse = lse - _since(biases[0], distance, lse).flatten(0, 1)
            got = self.parts.differentiate(
                (running.flatten(0, 1), o, do, lse), k[:count].flatten(0, 1), v[:count].flatten(0, 1), bias, scale
            )
            dq, dk_part, dv_part = (x.unflatten(0, (count, -1)) for x in got[:3])
            dk[:count] += dk_part
            dv[:count] += dv_part
            if got[3] is not None and got[4] is not None:
                columns[:count] += got[3].unflatten(0, (count, -1))
                totals[distance:] += got[4].unflatten(0, (count, -1))
            if grad is not None:
                de[:count] -= running.mT @ grad
                dq = _move(grad, e[:count].mT).add_(dq)
            before = torch.zeros_like(dq[:1]) if arrived is None else arrived[distance - 1 : distance].to(dq.dtype)
            grad = torch.cat([before, dq]).to(q.dtype)
        self.dv += _scatter(dv, level).flatten(1, 2)
        if self.dgates is not None:
            self.dgates += _scatter(totals - columns, level).flatten(1, 2)
        return torch.zeros_like(q) if grad is None else grad


def _untransport(k: Tensor, e: Tensor, finished: Tensor, dk: Tensor, de: Tensor) -> None:
    """Adds to dk and de what `finished`, the gradient of keys at the end of their group [fan, N, S, K], asks for."""
    grad, stages = finished[:1], _transports(k, e)
    for distance in range(k.shape[0] - 1, 0, -1):
        de[distance:] -= grad.mT @ stages[distance - 1][:-1]
        grad = torch.cat([_move(grad, e[distance:]), finished[k.shape[0] - distance : k.shape[0] - distance + 1]])
    dk += grad


def _unmultiply(e: Tensor, grad: Tensor, de: Tensor) -> None:
    """Adds to de what the gradient of the group's product [N, K, K] asks for."""
    totals = _products(e)
    for index in range(e.shape[0] - 1):  # e[0] was taken last
        before = totals[e.shape[0] - 2 - index]
        de[index] += torch.baddbmm(grad, before.mT, grad, alpha=-1)
        grad = torch.baddbmm(grad, grad, e[index].mT, alpha=-1)
    de[-1] += grad
