"""The running normaliser before a rank's first token, where a sequence is cut into ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.sequence import SequenceShard, wide


def normalizer_before(x: Tensor, cu_seqlens: Tensor | None, shard: SequenceShard) -> Tensor:
    """[N, H, M] fp32: the log-sum-exp over the earlier ranks' tokens of the first document; -inf for every other one."""
    x = wide(x)
    if cu_seqlens is not None:  # what this rank adds are its tokens of the last document
        last = torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-2]
        own = x.masked_fill(~last[:, None, None], float("-inf")).logsumexp(1)
    else:
        own = x.logsumexp(1)
    held = shard.holders(x.shape[1]).view(-1, 1, 1, 1)
    everything = shard.gather(own)
    # Masked before the sum and after it: the gradient of an empty log-sum-exp is not a number.
    sums = torch.where(shard.continues, everything.masked_fill(~held, float("-inf")), everything).logsumexp(0)
    before = torch.where(shard.continues, sums, float("-inf"))
    if cu_seqlens is None:
        return before
    others = torch.full_like(before, float("-inf")).expand(cu_seqlens.numel() - 2, -1, -1)
    return torch.cat([before, others])
