"""MoBA's fast path: chunks are chosen by the kernels that NSA uses, and attended to by `block_attention`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.block_attention.triton_common import Sizes
from flame.kernels.block_attention.triton_layout import make_blocks
from flame.kernels.block_attention.triton_op import block_attention_triton
from flame.kernels.block_attention.triton_select import choose_blocks, packed_means


def moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    scale: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    indices = torch.ops.flame.moba_route(q.detach(), k.detach(), cu_seqlens, chunk_size, max_seqlen, topk)
    return block_attention_triton(q, k, v, indices, cu_seqlens, chunk_size, scale)[0]


def route(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, chunk_size: int, max_seqlen: int | None, topk: int
) -> Tensor:
    """Chunks `[B, T, H, topk]` of every query and head."""
    blocks = make_blocks(k, chunk_size, cu_seqlens, max_seqlen)
    H, Hk, K = q.shape[2], k.shape[2], k.shape[3]
    sizes = Sizes(H, Hk, H, K, K, 1.0)
    return choose_blocks(q.contiguous(), packed_means(k, blocks), None, blocks, sizes, topk, False)


_library = torch.library.Library("flame", "FRAGMENT")
_library.define(
    "moba_route(Tensor q, Tensor k, Tensor? cu_seqlens, int chunk_size, int? max_seqlen, int topk) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CUDA", "CPU"):
    _library.impl("moba_route", route, _device)


@torch.library.register_fake("flame::moba_route")
def _fake(q, k, cu_seqlens, chunk_size, max_seqlen, topk):
    return q.new_empty(*q.shape[:3], topk, dtype=torch.int32)
