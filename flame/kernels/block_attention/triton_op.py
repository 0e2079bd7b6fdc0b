"""The fast path as operators of torch: `flame::block_attention` and its backward, with fakes and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.block_attention import triton_backward, triton_forward
from flame.kernels.block_attention.triton_common import Sizes
from flame.kernels.block_attention.triton_layout import Blocks, Entries, make_blocks, sort_entries
from flame.kernels.compile_together import compiled_together
from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv

SCRATCH = 1 << 28  # bytes that the parts of one band of queries may take


def band_of(tokens: int, q: Tensor, width: int, slots: int) -> int:
    """Queries a time, such that their parts `[n, H, S, width]` fit into SCRATCH: a multiple of 256, or all."""
    each = q.shape[2] * slots * width * q.element_size()
    most = max(256, SCRATCH // max(each, 1) // 256 * 256)
    return max(1, min(tokens, cdiv(cdiv(tokens, cdiv(tokens, most)), 256) * 256))


def plan(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cu_seqlens: Tensor | None, block_size: int, scale: float
) -> tuple[Entries, Blocks, Sizes]:
    sizes = Sizes(q.shape[2], k.shape[2], indices.shape[2], q.shape[3], v.shape[3], scale)
    blocks = make_blocks(q, block_size, cu_seqlens)
    band = band_of(blocks.tokens, q, max(sizes.K, sizes.V), indices.shape[3])
    return sort_entries(indices.flatten(0, 1), blocks, sizes.Hk, band), blocks, sizes


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, cu_seqlens, block_size, scale = inputs
    backward(outputs[0], q, k, v, *outputs, indices, cu_seqlens, block_size, scale)


@compiled_together(_then)
def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cu_seqlens: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and the log2 of every row's softmax sum `[B, T, H]`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    return triton_forward.attend(q, k, v, *plan(q, k, v, indices, cu_seqlens, block_size, scale))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, do = (x.contiguous() for x in (q, k, v, do.to(o.dtype)))
    tensors = (q, k, v, do, lse, triton_backward.row_sums(o, do))
    return triton_backward.differentiate(tensors, *plan(q, k, v, indices, cu_seqlens, block_size, scale))


_ARGUMENTS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "Tensor indices, Tensor? cu_seqlens, int block_size, float scale"
_library = torch.library.Library("flame", "FRAGMENT")
_library.define(f"block_attention({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"block_attention_backward(Tensor do, {_ARGUMENTS}, Tensor o, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CUDA", "CPU"):
    _library.impl("block_attention", forward, _device)
    _library.impl("block_attention_backward", backward, _device)


@torch.library.register_fake("flame::block_attention")
def _fake(q, k, v, indices, cu_seqlens, block_size, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("flame::block_attention_backward")
def _fake_backward(do, q, k, v, o, lse, indices, cu_seqlens, block_size, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, cu_seqlens, ctx.block_size, ctx.scale = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, indices, cu_seqlens)


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _direct_backward(do, *ctx.saved_tensors, ctx.block_size, ctx.scale)
    return *gradients, None, None, None, None


_direct_backward = Direct(torch.ops.flame.block_attention_backward, backward)
torch.library.register_autograd("flame::block_attention", _backward, setup_context=_setup_context)
block_attention_triton = Direct(torch.ops.flame.block_attention, forward, _setup_context, _backward)


@register_flop_formula(torch.ops.flame.block_attention)
def _flops(
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    indices_shape: Any,
    cu_seqlens: Any,
    block_size: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Products with keys and values of the chosen blocks, as if all were there."""
    B, T, H, K = q_shape
    return 2 * B * T * H * (K + v_shape[3]) * indices_shape[3] * block_size


@register_flop_formula(torch.ops.flame.block_attention_backward)
def _backward_flops(
    do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, o_shape: Any, lse_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """Five products instead of two."""
    indices_shape, cu_seqlens, block_size, *_ = args
    return 5 * _flops(q_shape, k_shape, v_shape, indices_shape, cu_seqlens, block_size) // 2
