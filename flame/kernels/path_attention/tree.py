"""The parallel form for GPUs: a tree of blocks whose parts are attention without masks, by the tiled kernels.

A block knows its queries moved to before it, its keys moved to its end, its product of reflections `I - E`, and what its
queries saw of its own keys (output and normalizer). Up to 8 neighbours join: the queries of each visit the keys of those
before it, nearest first, taking on one product after another, and outputs merge by their normalizers. Eight blocks of 64
tokens make one of 512, then 4096: a query is moved once for every part instead of once for every 64 keys.

Gates and document boundaries are biases: a key's is the gates from it to the end of its block, a query's the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.path_attention.blocks import make_blocks
from flame.kernels.path_attention.problem import Problem

BASE = 64
FAN = 8
APART = 1e4  # what a document boundary takes off a score

Part = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


def plain_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """A part in plain torch: q [N, Tq, K], k [N, Tk, K], v [N, Tk, V], bias [N, Tk] -> o [N, Tq, V], lse [N, Tq]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    scores = scores if bias is None else scores + bias.unsqueeze(-2)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


@dataclass(frozen=True)
class Level:
    """M blocks of S tokens in N = B * H rows.

    q, k [N, M, S, K]; e [N, M, K, K] wide, with which the block moves a row by ``q - q e``; v [N, M, S, V]; o [N, M, S, V]
    and lse [N, M, S] wide; gates [N, M, S] fp64, their running sums times the scale, or None.
    """

    q: Tensor
    k: Tensor
    e: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    gates: Tensor | None


def path_attention(p: Problem, part: Part) -> Tensor:
    """As the chunked form for Tq = Tk, without reading cu_seqlens on the host. `part` is attention without a mask."""
    B, T, H, _ = p.q.shape
    level = base_level(p)
    while level.q.shape[1] > 1:
        level = join(level, p.scale, part)
    o = level.o.flatten(1, 2)[:, :T]
    return o.unflatten(0, (B, H)).transpose(1, 2).to(p.q.dtype)


def padded_blocks(tokens: int) -> int:
    """Blocks of BASE tokens for `tokens`, such that every level joins whole groups."""
    blocks, unit = max(1, -(-tokens // BASE)), 1
    while blocks > FAN:
        blocks, unit = -(-blocks // FAN), unit * FAN
    return blocks * unit


def base_level(p: Problem) -> Level:
    """Blocks of 64 tokens with their own attention, by plain products."""
    wide = torch.promote_types(p.q.dtype, torch.float32)
    T, H = p.q.shape[1:3]
    blocks = padded_blocks(T)

    def split(x: Tensor) -> Tensor:  # [B, T, Hx, D] -> [N, M, S, D]
        x = x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2)
        return F.pad(x, (0, 0, 0, blocks * BASE - T)).flatten(0, 1).unflatten(1, (blocks, BASE))

    beta = split(p.beta.to(wide).unsqueeze(-1)).squeeze(-1)
    b = make_blocks(split(p.q).to(wide), split(p.k).to(wide), split(p.w).to(wide), beta)
    v, gates = split(p.v), _running_gates(p)
    gates = None if gates is None else split(gates.unsqueeze(-1)).squeeze(-1)
    scores = b.local * p.scale
    if gates is not None:
        scores = scores + (gates.unsqueeze(-1) - gates.unsqueeze(-2)).to(wide)
    hidden = torch.ones(BASE, BASE, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    o = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v
    e = b.w.transpose(-1, -2) @ b.y
    return Level(b.q.to(p.q.dtype), b.k.to(p.q.dtype), e, v, o.to(wide), lse, gates)


def _running_gates(p: Problem) -> Tensor | None:
    """[B, T, H] fp64. Documents are kept apart by gates that let nothing through at their first tokens."""
    if p.log_forget is None and p.cu_seqlens is None:
        return None
    B, T, H, _ = p.q.shape
    steps = p.q.new_zeros(B, T, H, dtype=torch.float64) if p.log_forget is None else p.log_forget.double() * p.scale
    if p.cu_seqlens is not None:
        starts = steps.new_zeros(T + 1).index_fill(0, p.cu_seqlens.long(), -APART)[:T]
        steps = steps + starts[:, None]
    return steps.cumsum(1)


def join(level: Level, scale: float, part: Part) -> Level:
    """Groups of up to FAN neighbours as blocks of the next level."""
    N, M = level.q.shape[:2]
    fan = min(FAN, M)
    top = fan == M

    def gather(x: Tensor) -> Tensor:  # [N, M, ..] -> [fan, N * groups, ..]
        return x.unflatten(1, (M // fan, fan)).movedim(2, 0).flatten(1, 2).contiguous()

    def scatter(x: Tensor) -> Tensor:  # [fan, N * groups, S, ..] -> [N, groups, fan * S, ..]
        return x.unflatten(1, (N, M // fan)).movedim(0, 2).flatten(2, 3)

    q, k, v, e, own = (gather(x) for x in (level.q, level.k, level.v, level.e, level.lse))
    gates = None if level.gates is None else gather(level.gates)
    bias = None if gates is None else (gates[..., -1:] - gates).to(own.dtype)
    running, arrived, outputs, normalizers = q, [q[0]], [], []
    for distance in range(1, fan):
        moving, count = running[1:], fan - distance
        near_k, near_v = k[:count].flatten(0, 1), v[:count].flatten(0, 1)
        near_bias = None if bias is None else bias[:count].flatten(0, 1)
        o, lse = part(moving.flatten(0, 1), near_k, near_v, near_bias, scale)
        o, lse = o.unflatten(0, (count, -1)), lse.unflatten(0, (count, -1))
        if gates is not None:
            lse = lse + (gates[distance:] - gates[:count, :, -1:]).to(lse.dtype)
        outputs.append(o)
        normalizers.append(lse)
        running = moving if top and distance == fan - 1 else move(moving, e[:count])
        arrived.append(running[0])
    o, lse = merge(gather(level.o), own, outputs, normalizers)
    if top:
        return Level(level.q[:, :1], level.k[:, :1], level.e[:, :1], level.v[:, :1], scatter(o), scatter(lse), None)
    q, k, product = scatter(torch.stack(arrived)), scatter(keys_at_end(k, e)), group_product(e)
    e = product.unflatten(0, (N, M // fan))
    return Level(q, k, e, scatter(v), scatter(o), scatter(lse), None if gates is None else scatter(gates))


def move(x: Tensor, e: Tensor) -> Tensor:
    """x - x e for stacks of rows [c, n, S, K] and [c, n, K, K], rounded once."""
    flat = x.flatten(0, 1)
    return torch.baddbmm(flat, flat, e.flatten(0, 1).to(x.dtype), alpha=-1).unflatten(0, x.shape[:2])


def keys_at_end(k: Tensor, e: Tensor) -> Tensor:
    """Keys [fan, n, S, K] moved on from the ends of their blocks to the end of the group."""
    fan, finished = k.shape[0], [k[-1]]
    for distance in range(1, fan):
        k = move(k[:-1], e[distance:].transpose(-1, -2))
        finished.append(k[-1])
    return torch.stack(finished[::-1])


def group_product(e: Tensor) -> Tensor:
    """E [n, K, K] of a group: a query passes its last block first, ``(I - e_last) ... (I - e_first) = I - E``."""
    total = e[-1]
    for other in e[:-1].flip(0).unbind(0):
        total = total + other - total @ other
    return total


def merge(o: Tensor, own: Tensor, outputs: list[Tensor], normalizers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over what queries saw in their own blocks and at each distance; those of block c have c distances."""
    parts = [F.pad(lse, (0, 0, 0, 0, index + 1, 0), value=-torch.inf) for index, lse in enumerate(normalizers)]
    total = torch.stack([own, *parts]).logsumexp(0)
    merged = torch.exp(own - total).unsqueeze(-1) * o
    for distance, (seen, lse) in enumerate(zip(outputs, normalizers), 1):
        merged[distance:] += torch.exp(lse - total[distance:]).unsqueeze(-1) * seen
    return merged, total
