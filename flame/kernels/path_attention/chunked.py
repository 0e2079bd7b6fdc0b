"""The parallel form in plain torch: block products pull a band of queries leftwards over the blocks of keys.

A band of query blocks meets the key blocks at distance 0, 1, 2, ... together, so the loop is over distances and not over
pairs. Bands are recomputed in the backward: memory is that of one band's scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flame.kernels.path_attention.blocks import Blocks, make_blocks, solve
from flame.kernels.path_attention.problem import Problem

BLOCK = 64
BAND = 8  # query blocks a time


def path_attention(p: Problem) -> Tensor:
    documents = [_attend(document) for document in p.documents() if document.q.shape[1]]
    return torch.cat(documents, 1) if documents else p.q.new_empty(*p.q.shape[:3], p.v.shape[3])


@dataclass(frozen=True)
class Row:
    """One document a row, cut in blocks. v [B, Hk, 1, N, C, V]; past_k, past_v [B, Hk, 1, S, D] of cached tokens.

    gates: running sums of the gates from the first new token on [B, Hk, G, N, C], or None; past_gates [B, Hk, G, S] are <= 0,
    back from it.
    """

    blocks: Blocks
    v: Tensor
    past_k: Tensor
    past_v: Tensor
    gates: Tensor | None
    past_gates: Tensor | None
    scale: float


def _attend(p: Problem) -> Tensor:
    row, queries = make_row(p), p.q.shape[1]
    bands, count = [], row.v.shape[3]
    needed = torch.is_grad_enabled() and count > BAND
    for first in range(0, count, BAND):
        bands.append(checkpoint(_band, row, first, use_reentrant=False) if needed else _band(row, first))
    o = torch.cat(bands, 3).flatten(3, 4).flatten(1, 2)[:, :, :queries]  # [B, H, T, V]
    return o.transpose(1, 2).to(p.q.dtype)


def make_row(p: Problem) -> Row:
    wide = torch.promote_types(p.q.dtype, torch.float32)
    Hk, cached, C = p.k.shape[2], p.k.shape[1] - p.q.shape[1], block_size(p.q.shape[1])
    q, w = split(p.q.to(wide), Hk, C), split(p.w.to(wide), Hk, C)
    k, v = split(p.k[:, cached:].to(wide), Hk, C), split(p.v[:, cached:].to(wide), Hk, C)
    beta = split(p.beta.to(wide).unsqueeze(-1), Hk, C).squeeze(-1)
    past_k, past_v = (x[:, :cached].to(wide).transpose(1, 2).unsqueeze(2) for x in (p.k, p.v))
    own, before = (None, None) if p.log_forget is None else _gates(p.log_forget, cached, Hk, C)
    return Row(make_blocks(q, k, w, beta), v, past_k, past_v, own, before, p.scale)


def block_size(tokens: int) -> int:
    return min(BLOCK, max(16, 1 << (tokens - 1).bit_length()))


def split(x: Tensor, kv_heads: int, C: int) -> Tensor:
    """[B, T, H, D] -> [B, Hk, H / Hk, N, C, D], zeros after the end (they reflect nothing and no query sees them)."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % C))
    return x.unflatten(1, (kv_heads, -1)).unflatten(3, (-1, C))


def _gates(log_forget: Tensor, cached: int, Hk: int, C: int) -> tuple[Tensor, Tensor]:
    """As `Row` holds them, in fp64, because differences of long sums are what counts."""
    f = log_forget.double()
    own = split(f[:, cached:].cumsum(1).unsqueeze(-1), Hk, C).squeeze(-1)
    before = f[:, :cached]
    back = before - before.flip(1).cumsum(1).flip(1)  # -(gates over j + 1 .. last cached)
    return own, back.transpose(1, 2).unflatten(1, (Hk, -1))


def _band(row: Row, first: int) -> Tensor:
    """Outputs [B, Hk, G, n, C, V] of the query blocks first .. first + BAND."""
    b, own = row.blocks, row.gates
    last = min(first + BAND, row.v.shape[3])
    band, running = slice(first, last), b.q[:, :, :, first:last]
    C = running.shape[-2]
    hidden = torch.ones(C, C, dtype=torch.bool, device=running.device).triu(1)
    scores = [(b.local[:, :, :, band] + _difference(own, band, band, running)).masked_fill(hidden, -torch.inf)]
    for distance in range(1, last):
        done = max(0, distance - first)  # query blocks that have met all their keys
        seen, mine = slice(first + done - distance, last - distance), slice(first + done, last)
        moving = running[:, :, :, done:]
        met = moving @ b.k[:, :, :, seen].transpose(-1, -2) + _difference(own, mine, seen, running)
        scores.append(F.pad(met, (0, 0, 0, 0, done, 0), value=-torch.inf))
        moving = moving - (moving @ b.w[:, :, :, seen].transpose(-1, -2)) @ b.y[:, :, :, seen]
        running = torch.cat([running[:, :, :, :done], moving], 3)
    with_past = running @ row.past_k[:, :, :, None].transpose(-1, -2)
    if own is not None and row.past_gates is not None:
        gates = own[:, :, :, band, :, None] - row.past_gates[:, :, :, None, None]
        with_past = with_past + gates.to(running.dtype)
    weights = (torch.cat([*scores, with_past], -1) * row.scale).softmax(-1)
    *near, far = weights.split([C] * last + [row.past_k.shape[-2]], -1)
    o = far @ row.past_v[:, :, :, None]
    for distance, weight in enumerate(near):
        done = max(0, distance - first)
        met = weight[:, :, :, done:] @ row.v[:, :, :, first + done - distance : last - distance]
        o = o + F.pad(met, (0, 0, 0, 0, done, 0))
    return o


def _difference(gates: Tensor | None, mine: slice, seen: slice, like: Tensor) -> Tensor | float:
    """Gates between query and key, [.., n, C, C], of blocks `mine` and `seen`."""
    if gates is None:
        return 0.0
    return (gates[:, :, :, mine, :, None] - gates[:, :, :, seen, None, :]).to(like.dtype)


def transport_keys(k: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """See `flame.kernels.path_attention.transport_keys`."""
    wide = torch.promote_types(k.dtype, torch.float32)
    k, w, beta = (x.to(wide).transpose(1, 2) for x in (k, w, beta.unsqueeze(-1)))  # [B, Hk, T, K]
    keys, start = k[:, :, : k.shape[2] - w.shape[2]], k.shape[2] - w.shape[2]
    for first in range(0, w.shape[2], BLOCK):
        block = slice(first, min(first + BLOCK, w.shape[2]))
        wb, scaled = w[:, :, block], beta[:, :, block]
        own = k[:, :, start + block.start : start + block.stop]
        met = torch.cat([keys @ wb.transpose(-1, -2), (own @ wb.transpose(-1, -2)).triu(1)], 2)  # [j, m] = k_j . w_m
        reach = solve(scaled * (wb @ wb.transpose(-1, -2)), scaled * met.transpose(-1, -2))
        keys = torch.cat([keys, own], 2) - reach.transpose(-1, -2) @ wb
    return keys.transpose(1, 2)
