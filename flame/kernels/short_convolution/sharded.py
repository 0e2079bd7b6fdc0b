"""What a rank's convolutions need of the ranks before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flame.kernels.sequence import SequenceShard, opening_states


def state_before(x: Tensor, width: int, cu_seqlens: Tensor | None, shard: SequenceShard) -> Tensor:
    """[N, C, W]: for the document that began earlier the inputs before x [B, T, C], for the others zeros.

    Only W - 1 inputs are ever read, so only they travel; the oldest column is left zero.
    """
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    before = shard.tail(x, width - 1)
    return opening_states(F.pad(before.mT, (1, 0)), sequences)
