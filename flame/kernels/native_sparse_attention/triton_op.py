"""NSA's fast path as operators of torch, with fakes and autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flame.kernels.block_attention.triton_backward import row_sums
from flame.kernels.block_attention.triton_common import Sizes
from flame.kernels.block_attention.triton_layout import make_blocks
from flame.kernels.block_attention.triton_op import block_attention_triton
from flame.kernels.block_attention.triton_select import choose_blocks, packed_means
from flame.kernels.direct import Direct
from flame.kernels.native_sparse_attention import triton_compressed, triton_gate

if TYPE_CHECKING:
    from flame.kernels.native_sparse_attention import SparsePattern


def branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparsePattern,
    scale: float,
    cu_seqlens: Tensor | None,
    block_indices: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, H, V]` of the compressed and the selected branch."""
    size = pattern.block_size
    blocks = make_blocks(k, size, cu_seqlens)
    k_means, v_means = packed_means(k, blocks), packed_means(v, blocks)
    compressed, lse = compressed_attention(q, k_means, v_means, cu_seqlens, size, max_seqlen, scale)
    if block_indices is None:
        block_indices = torch.ops.flame.nsa_choose(
            q.detach(), k_means.detach(), lse, cu_seqlens, size, max_seqlen, pattern.block_count, scale
        )
    return compressed, block_attention_triton(q, k, v, block_indices, cu_seqlens, size, scale)[0]


def _sizes(q: Tensor, k_means: Tensor, v_means: Tensor, scale: float) -> Sizes:
    Hk = k_means.shape[1]
    return Sizes(q.shape[2], Hk, Hk, q.shape[3], v_means.shape[2], scale)


def forward(
    q: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    max_seqlen: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and log2 sums `[B, T, H]`; means `[blocks, Hk, .]`."""
    q, k_means, v_means = (x.contiguous() for x in (q, k_means, v_means))
    blocks = make_blocks(q, block_size, cu_seqlens, max_seqlen)
    return triton_compressed.attend(q, k_means, v_means, blocks, _sizes(q, k_means, v_means, scale))


def backward(
    do: Tensor,
    q: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    max_seqlen: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k_means, v_means, do = (x.contiguous() for x in (q, k_means, v_means, do.to(o.dtype)))
    blocks = make_blocks(q, block_size, cu_seqlens, max_seqlen)
    tensors = (q, k_means, v_means, do, lse, row_sums(o, do))
    return triton_compressed.differentiate(tensors, blocks, _sizes(q, k_means, v_means, scale))


def choose(
    q: Tensor,
    k_means: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    max_seqlen: int | None,
    count: int,
    scale: float,
) -> Tensor:
    """Blocks `[B, T, Hk, count]` of every query."""
    blocks = make_blocks(q, block_size, cu_seqlens, max_seqlen)
    q, k_means = q.contiguous(), k_means.contiguous()
    return choose_blocks(q, k_means, lse, blocks, _sizes(q, k_means, k_means, scale), count, True)


_tags = (torch.Tag.pt2_compliant_tag,)
_MEANS = "Tensor q, Tensor k_means, Tensor v_means"
_GATED = "Tensor a, Tensor b, Tensor? c, Tensor gates"
_library = torch.library.Library("flame", "FRAGMENT")
_SCHEMAS = {
    "nsa_compressed": (
        f"({_MEANS}, Tensor? cu_seqlens, int block_size, int? max_seqlen, float scale) -> (Tensor, Tensor)",
        forward,
    ),
    "nsa_compressed_backward": (
        f"(Tensor do, {_MEANS}, Tensor o, Tensor lse, Tensor? cu_seqlens, int block_size, int? max_seqlen, "
        "float scale) -> (Tensor, Tensor, Tensor)",
        backward,
    ),
    "nsa_choose": (
        "(Tensor q, Tensor k_means, Tensor lse, Tensor? cu_seqlens, int block_size, int? max_seqlen, int count, "
        "float scale) -> Tensor",
        choose,
    ),
    "nsa_gate": (f"({_GATED}) -> Tensor", triton_gate.forward),
    "nsa_gate_backward": (f"(Tensor do, {_GATED}) -> (Tensor, Tensor, Tensor, Tensor)", triton_gate.backward),
}
for _name, (_schema, _function) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=_tags)
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _function, _device)


@torch.library.register_fake("flame::nsa_compressed")
def _fake(q, k_means, v_means, cu_seqlens, block_size, max_seqlen, scale):
    return q.new_empty(*q.shape[:3], v_means.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("flame::nsa_compressed_backward")
def _fake_backward(do, q, k_means, v_means, o, lse, cu_seqlens, block_size, max_seqlen, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k_means, v_means))


@torch.library.register_fake("flame::nsa_choose")
def _fake_choose(q, k_means, lse, cu_seqlens, block_size, max_seqlen, count, scale):
    return q.new_empty(*q.shape[:2], k_means.shape[1], count, dtype=torch.int32)


@torch.library.register_fake("flame::nsa_gate")
def _fake_gate(a, b, c, gates):
    return a.new_empty(a.shape)


@torch.library.register_fake("flame::nsa_gate_backward")
def _fake_gate_backward(do, a, b, c, gates):
    return tuple(a.new_empty(0 if x is None else x.shape) for x in (a, b, c, gates))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k_means, v_means, cu_seqlens, ctx.block_size, ctx.max_seqlen, ctx.scale = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k_means, v_means, o, lse, cu_seqlens)


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_direct_backward(do, *ctx.saved_tensors, ctx.block_size, ctx.max_seqlen, ctx.scale), None, None, None, None


def _setup_gate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    da, db, dc, dgates = _direct_gate_backward(do, *ctx.saved_tensors)
    return da, db, None if ctx.saved_tensors[2] is None else dc, dgates


_direct_backward = Direct(torch.ops.flame.nsa_compressed_backward, backward)
_direct_gate_backward = Direct(torch.ops.flame.nsa_gate_backward, triton_gate.backward)
torch.library.register_autograd("flame::nsa_compressed", _backward, setup_context=_setup_context)
torch.library.register_autograd("flame::nsa_gate", _backward_gate, setup_context=_setup_gate)
compressed_attention = Direct(torch.ops.flame.nsa_compressed, forward, _setup_context, _backward)
gated_sum = Direct(torch.ops.flame.nsa_gate, triton_gate.forward, _setup_gate, _backward_gate)
