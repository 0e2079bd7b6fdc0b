"""NSA's fast path as one operator of torch, with fake and autograd.

Compressed and selected branch and the gated sum are one operator, so that its backward neither holds the gradient of each
branch's output nor of q from each: the branches add to one dq. The window branch is `softmax_attention`'s and comes in as a
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flame.kernels.block_attention import triton_backward, triton_forward
from flame.kernels.block_attention import triton_op as block_op
from flame.kernels.block_attention.triton_common import Sizes
from flame.kernels.block_attention.triton_layout import make_blocks
from flame.kernels.block_attention.triton_select import choose_blocks, packed_means
from flame.kernels.compile_together import compiled_together
from flame.kernels.direct import Direct
from flame.kernels.native_sparse_attention import triton_compressed, triton_gate


@dataclass(frozen=True)
class Call:
    """The numbers of a call. count: blocks that the selected branch attends to."""

    block_size: int
    count: int
    scale: float
    max_seqlen: int | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Tensor | None,
    gates: Tensor,
    call: Call,
    cu_seqlens: Tensor | None,
    block_indices: Tensor | None,
) -> Tensor:
    """The gated sum `[B, T, H, V]` of the compressed, the selected and, if there is one, the window branch."""
    blocks = make_blocks(k, call.block_size, cu_seqlens)
    means = packed_means(k, blocks), packed_means(v, blocks)
    numbers = call.block_size, call.count, call.scale, call.max_seqlen
    return nsa(q, k, v, *means, window, gates, cu_seqlens, block_indices, *numbers)[0]


def _sizes(q: Tensor, k_means: Tensor, v_means: Tensor, scale: float) -> Sizes:
    Hk = k_means.shape[1]
    return Sizes(q.shape[2], Hk, Hk, q.shape[3], v_means.shape[2], scale)


def compress(
    q: Tensor, k_means: Tensor, v_means: Tensor, cu_seqlens: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """The compressed branch `[B, T, H, V]` and its log2 sums `[B, T, H]`; means `[blocks, Hk, .]`; all dense."""
    blocks = make_blocks(q, call.block_size, cu_seqlens, call.max_seqlen)
    return triton_compressed.attend(q, k_means, v_means, blocks, _sizes(q, k_means, v_means, call.scale))


def choose(q: Tensor, k_means: Tensor, lse: Tensor, cu_seqlens: Tensor | None, call: Call) -> Tensor:
    """Blocks `[B, T, Hk, count]` of every query."""
    blocks = make_blocks(q, call.block_size, cu_seqlens, call.max_seqlen)
    return choose_blocks(q, k_means, lse, blocks, _sizes(q, k_means, k_means, call.scale), call.count, True)


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, _, block_size, _, scale, max_seqlen = inputs
    backward(outputs[0], *tensors, *outputs[1:], block_size, scale, max_seqlen)


@compiled_together(_then)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    window: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor | None,
    block_indices: Tensor | None,
    block_size: int,
    count: int,
    scale: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o; then output and log2 sums of the compressed and of the selected branch, and the blocks chosen."""
    q, k, v, k_means, v_means = (x.contiguous() for x in (q, k, v, k_means, v_means))
    call = Call(block_size, count, scale, max_seqlen)
    compressed, lse = compress(q, k_means, v_means, cu_seqlens, call)
    if block_indices is None:
        indices = choose(q, k_means, lse, cu_seqlens, call)
    else:
        indices = block_indices.to(torch.int32, copy=True)  # an operator's results must not be its arguments
    selected, selected_lse = triton_forward.attend(
        q, k, v, *block_op.plan(q, k, v, indices, cu_seqlens, block_size, scale)
    )
    o = triton_gate.forward(compressed, selected, window, gates)
    return o, compressed, lse, selected, selected_lse, indices


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    window: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor | None,
    compressed: Tensor,
    lse: Tensor,
    selected: Tensor,
    selected_lse: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the means, the window branch (empty without one) and gates."""
    do, q, k, v, k_means, v_means = (x.contiguous() for x in (do.to(q.dtype), q, k, v, k_means, v_means))
    of_means, of_blocks, dwindow, dgates = triton_gate.backward(
        do, (compressed, lse), (selected, selected_lse), window, gates
    )
    blocks = make_blocks(q, block_size, cu_seqlens, max_seqlen)
    dq, dk_means, dv_means = triton_compressed.differentiate(
        (q, k_means, v_means, do, *of_means), blocks, _sizes(q, k_means, v_means, scale)
    )
    plan = block_op.plan(q, k, v, indices, cu_seqlens, block_size, scale)
    _, dk, dv = triton_backward.differentiate((q, k, v, do, *of_blocks), *plan, dq)
    return dq, dk, dv, dk_means, dv_means, dwindow, dgates


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_means, Tensor v_means, Tensor? window, Tensor gates, Tensor? cu_seqlens"
)
_OUTPUTS = "Tensor compressed, Tensor lse, Tensor selected, Tensor selected_lse, Tensor indices"
_library = torch.library.Library("flame", "FRAGMENT")
_SCHEMAS = {
    "nsa": (
        f"({_ARGUMENTS}, Tensor? block_indices, int block_size, int count, float scale, int? max_seqlen) -> "
        f"({', '.join(['Tensor'] * 6)})",
        forward,
    ),
    "nsa_backward": (
        f"(Tensor do, {_ARGUMENTS}, {_OUTPUTS}, int block_size, float scale, int? max_seqlen) -> "
        f"({', '.join(['Tensor'] * 7)})",
        backward,
    ),
}
for _name, (_schema, _function) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _function, _device)


@torch.library.register_fake("flame::nsa")
def _fake(q, k, v, k_means, v_means, window, gates, cu_seqlens, block_indices, block_size, count, scale, max_seqlen):
    o, lse = (q.new_empty(*q.shape[:3], v.shape[3]) for _ in range(3)), q.new_empty(q.shape[:3], dtype=torch.float32)
    whole, compressed, selected = o
    slots = count if block_indices is None else block_indices.shape[3]
    indices = q.new_empty(*q.shape[:2], k.shape[2], slots, dtype=torch.int32)
    return whole, compressed, lse, selected, torch.empty_like(lse), indices


@torch.library.register_fake("flame::nsa_backward")
def _fake_backward(do, q, k, v, k_means, v_means, window, gates, *rest):
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, k_means, v_means, window)) + (
        gates.new_empty(gates.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.block_size, _, ctx.scale, ctx.max_seqlen = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros stand in for the gradients of the branches' outputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    *found, dwindow, dgates = _direct_backward(do, *saved, ctx.block_size, ctx.scale, ctx.max_seqlen)
    return *found, None if saved[5] is None else dwindow, dgates, None, None, None, None, None, None


_direct_backward = Direct(torch.ops.flame.nsa_backward, backward)
torch.library.register_autograd("flame::nsa", _backward, setup_context=_setup_context)
nsa = Direct(torch.ops.flame.nsa, forward, _setup_context, _backward)
