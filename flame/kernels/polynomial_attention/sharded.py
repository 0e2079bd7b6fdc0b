"""The state before a rank's first token, where a sequence is cut into ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.polynomial_attention.chunked import polynomial_features
from flame.kernels.sequence import SequenceShard, wide


def state_before(
    k: Tensor,
    v: Tensor,
    coefficients: tuple[float, float, float],
    cu_seqlens: Tensor | None,
    shard: SequenceShard,
) -> Tensor:
    """[B, H, F, V + 1]: the sum of what earlier ranks wrote for the first document. Nothing decays, so a rank's addend is
    one matrix product."""
    features = polynomial_features(wide(k), coefficients)
    if cu_seqlens is not None:  # what goes on to the next rank are the tokens of the last document
        last = torch.arange(k.shape[1], device=k.device) >= cu_seqlens[-2]
        features = features * last[:, None, None]
    values = torch.cat([wide(v), torch.ones_like(v[..., :1], dtype=features.dtype)], -1)
    addend = torch.einsum("bthf,bthv->bhfv", features, values)
    whole = 1.0 if cu_seqlens is None or cu_seqlens.numel() == 2 else 0.0
    return shard.carry(addend, addend.new_full((1, 1, 1, 1), whole))
