"""The tree as one operator of torch, `flame::path_attention`, with its fake, gradient and FLOP count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.compile_together import compiled_together
from flame.kernels.direct import Direct
from flame.kernels.path_attention import tree
from flame.kernels.path_attention.levels import kept_shapes, padded_tokens
from flame.kernels.path_attention.parts import Parts, PlainParts
from flame.kernels.path_attention.problem import Problem
from flame.kernels.softmax_attention.gates import gate_gradient

WIDEST = 128  # heads up to which the levels run as few kernels; wider ones as parts


def _parts(tiled: bool) -> Parts:
    if not tiled:
        return PlainParts()
    from flame.kernels.path_attention.triton_parts import TritonParts  # imports triton, which a CPU does not need

    return TritonParts()


def _walked(q: Tensor, v: Tensor, tiled: bool) -> bool:
    return tiled and q.dtype in (torch.bfloat16, torch.float16) and max(q.shape[3], v.shape[3]) <= WIDEST


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_forget: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    tiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]` and every query's base-2 log of its softmax sum `[B, H, T padded]`; what walks keep for the backward
    (`levels.kept_shapes`), else empty. tiled: by Triton's kernels."""
    return (_by_kernels if tiled else _by_parts)(q, k, v, w, beta, log_forget, cu_seqlens, scale, tiled)


def _by_parts(q, k, v, w, beta, log_forget, cu_seqlens, scale, tiled):
    o, lse = tree.forward(Problem(q, k, v, w, beta, log_forget, scale, cu_seqlens), _parts(tiled))
    return o, lse, q.new_empty(0), q.new_empty(0), lse.new_empty(0)


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, scale, tiled = inputs
    _gradients(outputs[0], *tensors, *outputs, scale, tiled)


@compiled_together(_then)
def _by_kernels(q, k, v, w, beta, log_forget, cu_seqlens, scale, tiled):
    if not _walked(q, v, tiled):
        return _by_parts(q, k, v, w, beta, log_forget, cu_seqlens, scale, tiled)
    from flame.kernels.path_attention import triton_tree

    o, lse, kept = triton_tree.forward(Problem(q, k, v, w, beta, log_forget, scale, cu_seqlens))
    return o, lse, kept.q, kept.k, kept.e


_path = torch.library.custom_op("flame::path_attention", _forward, mutates_args=())


@_path.register_fake
def _(q, k, v, w, beta, log_forget, cu_seqlens, scale, tiled):
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    walked = _walked(q, v, tiled)
    shapes = kept_shapes(q, k) if walked else ((0,),) * 3
    o, tokens = q.new_empty(B, T, H, v.shape[3]), padded_tokens(T) if walked else tree.padded_blocks(T) * tree.BASE
    return o, q.new_empty(B, H, tokens, dtype=wide), *map(q.new_empty, shapes[:2]), q.new_empty(shapes[2], dtype=wide)


def _gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_forget: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q_kept: Tensor,
    k_kept: Tensor,
    e_kept: Tensor,
    scale: float,
    tiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dw, dbeta and d log_forget (empty without gates)."""
    problem = Problem(q, k, v, w, beta, log_forget, scale, cu_seqlens)
    if _walked(q, v, tiled):
        from flame.kernels.path_attention import triton_tree

        kept = triton_tree.Rows(q_kept, k_kept, e_kept)
        found = triton_tree.backward(problem, o, lse, kept, do.to(q.dtype))
        found |= {"w": found["w"].to(w.dtype), "beta": found["beta"].to(beta.dtype)}
    else:
        found = tree.backward(problem, o, lse, do.to(q.dtype), _parts(tiled))
    dforget = lse.new_empty(0)
    if log_forget is not None:
        dforget = (gate_gradient(found["gates"], cu_seqlens) * scale).to(log_forget.dtype)
    return found["q"], found["k"], found["v"], found["w"], found["beta"], dforget


_path_backward = torch.library.custom_op("flame::path_attention_backward", _gradients, mutates_args=())


@_path_backward.register_fake
def _(do, q, k, v, w, beta, log_forget, cu_seqlens, o, lse, q_kept, k_kept, e_kept, scale, tiled):
    dforget = lse.new_empty(0) if log_forget is None else log_forget.new_empty(log_forget.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, w, beta)), dforget


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.tiled = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: checkpointing gives them out a single time
    *gradients, dforget = path_backward(do, *saved, ctx.scale, ctx.tiled)
    return *gradients, None if saved[5] is None else dforget, None, None, None


_path.register_autograd(_backward, setup_context=_save)
path_backward = Direct(_path_backward, _gradients)
path_tree = Direct(_path, _forward, _save, _backward)


@register_flop_formula(torch.ops.flame.path_attention)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores and weighted values of the lower triangle."""
    B, T, H, K = q_shape
    return B * H * T * (T + 1) * (K + v_shape[3])


@register_flop_formula(torch.ops.flame.path_attention_backward)
def _(do_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, H, K = q_shape
    return 5 * B * H * T * (T + 1) * (K + v_shape[3]) // 2
