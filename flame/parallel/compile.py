"""torch.compile by decoder block: equal blocks share one compilation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compile every block in place, which leaves module and parameter names alone.

    Each block is a graph of its own, so the cost does not grow with depth, and FSDP's hooks run between graphs.
    """
    # Blocks differ in their parameters only, but a hybrid has several kinds, and packed and plain rows differ too.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)
    for block in blocks:
        block.compile(backend=backend)
