"""What the tiled kernels must know of the gates and documents: running sums, the keys that can be left out, boundaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def running_sums(log_forget: Tensor) -> Tensor:
    """`[2, B, H, T]` fp32 of log_forget `[B, T, H]`: base-2 sums along a row, as what fp32 holds and what it drops.

    Over a long row they grow without bound while only differences count; two halves keep those exact to fp32.
    """
    total = (log_forget.detach().transpose(1, 2).double() * math.log2(math.e)).cumsum(-1)
    high = total.float()
    return torch.stack([high, (total - high.double()).float()])


def gate_gradient(dtotal: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """d log_forget `[B, T, H]` from the gradient of the natural running sums `[B, H, T]`: suffix sums in each document."""
    suffix = dtotal.double().flip(-1).cumsum(-1).flip(-1)
    if cu_seqlens is not None:
        after = torch.cat([suffix, suffix.new_zeros(*suffix.shape[:2], 1)], -1)
        _, end = boundaries(cu_seqlens, suffix.shape[-1])
        suffix = suffix - after[..., end.long()]
    return suffix.float().transpose(1, 2).contiguous()


def threshold(q: Tensor, k: Tensor, scale: float, share: float) -> Tensor:
    """`[B, H]`: keys whose base-2 gate sum to a query is below this carry less than `share` of its weight together.

    With u >= |scale q k|, the query's own key has at least the score -u, and each of at most T others at most u + bias.
    """
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(1) for x in (q, k))
    reach = q_norm * k_norm.repeat_interleave(q.shape[2] // k.shape[2], 1) * abs(scale)
    return (2 * math.log2(math.e)) * -reach.double() + math.log2(share) - math.log2(k.shape[1])


def first_keys(sums: Tensor, bound: Tensor, queries: int, BM: int, BN: int) -> Tensor:
    """`[B, H, tiles]` int32: the first key, a multiple of BN, that each tile of BM queries has to see."""
    total, keys = sums[0].double() + sums[1].double(), sums.shape[-1]
    firsts, lasts = total[..., keys - queries :: BM], total[..., _ends(keys, BN, total.device)]
    wanted = bound.unsqueeze(-1) - firsts
    return (torch.searchsorted(-lasts, wanted) * BN).int()


def last_rows(sums: Tensor, bound: Tensor, queries: int, BM: int, BN: int) -> Tensor:
    """`[B, H, tiles]` int32: the end of the query rows, a multiple of BM, that have to see each tile of BN keys."""
    total, keys = sums[0].double() + sums[1].double(), sums.shape[-1]
    firsts, lasts = total[..., keys - queries :: BM], total[..., _ends(keys, BN, total.device)]
    wanted = -(bound.unsqueeze(-1) + lasts)
    return (torch.searchsorted((-firsts).contiguous(), wanted, right=True) * BM).int()


def _ends(keys: int, BN: int, device: torch.device) -> Tensor:
    """Index of the last key of every tile."""
    return (torch.arange(BN, keys + BN, BN, device=device) - 1).clamp_max(keys - 1)


def boundaries(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Begin and end of every token's document, `[T]` int32 each."""
    bounds = cu_seqlens.to(torch.int32)
    token = torch.arange(tokens, device=bounds.device, dtype=torch.int32)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True).clamp_max(bounds.shape[0] - 2)
    return bounds[document], bounds[document + 1]
