"""The fast path as operators of torch: `flame::log_linear_attention_forward` and `..._backward`, with fakes and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.compile_together import compiled_together
from flame.kernels.linear_attention.triton_op import as_rows
from flame.kernels.log_linear_attention.problem import Problem
from flame.kernels.log_linear_attention.triton_layout import make_layout
from flame.kernels.log_linear_attention.triton_passes import backward_pass, forward_pass

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor level_weights, Tensor decay, Tensor? cu_seqlens"
_SCHEMAS = {
    "log_linear_attention_forward": f"({_TENSORS}, float scale) -> Tensor",
    "log_linear_attention_backward": (
        f"({_TENSORS}, Tensor do, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


def log_linear_attention_triton(p: Problem) -> Tensor:
    """o [B, T, H, V] in v's dtype of a problem that `kernels_cover`."""
    decay = p.log_decay if p.decay is None else p.decay
    return _Chunks.apply(p.q, p.k, p.v, p.weights, decay, p.cu_seqlens, p.scale)


def _then(inputs, o):
    *tensors, scale = inputs
    backward(*tensors, o, scale)


@compiled_together(_then)
def forward(q, k, v, level_weights, decay, cu_seqlens, scale):
    layout = make_layout(q, v, level_weights, cu_seqlens, scale)
    return forward_pass(layout, *(as_rows(x) for x in (q, k, v)), level_weights.contiguous(), decay.contiguous())


def fake_forward(q, k, v, level_weights, decay, cu_seqlens, scale):
    return v.new_empty(v.shape)


def backward(q, k, v, level_weights, decay, cu_seqlens, do, scale):
    """Gradients of q, k, v, level_weights and decay."""
    layout = make_layout(q, v, level_weights, cu_seqlens, scale)
    tensors = tuple(as_rows(x) for x in (q, k, v, do.to(v.dtype)))
    return backward_pass(layout, tensors, level_weights.contiguous(), decay.contiguous())


def fake_backward(q, k, v, level_weights, decay, cu_seqlens, do, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, level_weights, decay))


class _Chunks(torch.autograd.Function):
    """Autograd around the two operators. A plain Function costs the host a third of what a custom_op's layers do."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return torch.ops.flame.log_linear_attention_forward(*inputs)

    @staticmethod
    def backward(ctx, do):
        gradients = torch.ops.flame.log_linear_attention_backward(*ctx.saved_tensors, do, ctx.scale)
        return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad)), None, None


def _flops(v_shape, K: int, levels: int) -> int:
    """Multiply-adds, counted twice, of one pass: a write, and reads of half as many states as there are levels."""
    batch, tokens, heads, V = v_shape
    return batch * tokens * heads * K * V * (2 + min(levels - 1, max(tokens - 1, 1).bit_length()))


def _forward_flops(q_shape, k_shape, v_shape, weights_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(v_shape, q_shape[3], weights_shape[3])


def _backward_flops(q_shape, k_shape, v_shape, weights_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(v_shape, q_shape[3], weights_shape[3])


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _run, _fake in (
    ("log_linear_attention_forward", forward, fake_forward),
    ("log_linear_attention_backward", backward, fake_backward),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
register_flop_formula(torch.ops.flame.log_linear_attention_forward)(_forward_flops)
register_flop_formula(torch.ops.flame.log_linear_attention_backward)(_backward_flops)
