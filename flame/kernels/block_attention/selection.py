"""Which key blocks a query sees: those it must, then those that score best, ties to the earlier block."""

from __future__ import annotations

import torch
from torch import Tensor


def select_blocks(scores: Tensor, current: Tensor, count: int, *, neighbours: bool) -> Tensor:
    """The `count` best blocks of every query.

    Args:
        scores: `[B, n, Hs, C]` of the document's first C blocks, finite; blocks after the current one are not looked at.
        current: `[n]` int64, the block that holds the query, < C.
        count: blocks to choose, at least 1.
        neighbours: whether the previous and the first block are always chosen too (NSA). The current one always is, and
            where `count` is too small for all three, the current comes first and the previous second.

    Returns:
        `[B, n, Hs, count]` int32 in ascending order, -1 after the last.
    """
    scores = scores.detach()
    block = torch.arange(scores.shape[-1], device=scores.device)
    current = current[:, None, None]
    rank = torch.zeros_like(block).expand(current.shape[0], 1, -1)
    if neighbours:
        rank = torch.where(block == 0, 1, rank)
        rank = torch.where(block == current - 1, 2, rank)
    rank = torch.where(block == current, 3, rank)
    rank = torch.where(block > current, -1, rank)
    best = scores.sort(dim=-1, descending=True, stable=True).indices
    # A second stable sort by rank keeps the order of scores, and of blocks among equal ones, within a rank.
    order = rank.expand_as(scores).gather(-1, best).sort(dim=-1, descending=True, stable=True).indices
    chosen = best.gather(-1, order)[..., :count]
    chosen = torch.where(chosen > current, scores.shape[-1], chosen).sort(-1).values
    chosen = torch.where(chosen == scores.shape[-1], -1, chosen).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, count - chosen.shape[-1]), value=-1)
