"""The fast path on a part of a sequence that is cut over ranks.

What a rank's tokens do to the state, S_out = M S_in + B, and to the gradient that comes back, dS_in = M^T dS_out + C, is found
by the same sweeps that cut long rows into segments, before anything arrives. After one exchange of (M, B) the plain sweep runs
from the state that comes in, after one of (M, C) the plain backward runs from the gradient that comes back. So the ranks do
what one process does on their tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.delta_rule.plan import CHUNK
from flame.kernels.delta_rule.problem import Tied
from flame.kernels.delta_rule.triton_op import (
    Call,
    as_rows,
    cut_of,
    make_call,
    run_forward,
    run_merge,
    run_prepare,
    run_reverse,
)
from flame.kernels.delta_rule.triton_prepare import ROWS
from flame.kernels.sequence import SequenceShard, opening_states

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? decay, Tensor? erase, Tensor? cu_seqlens"
_PREPARED = "Tensor vectors, Tensor inverse, Tensor scores, Tensor openings"
_OPTIONS = "bool exclusive, bool normalize, float scale"


def delta_rule_triton_part(p: Tied, shard: SequenceShard) -> Tensor:
    """o [B, T, H, V] of this rank's part of a validated problem without states."""
    return _Part.apply(
        p.q, p.k, p.v, p.beta, p.decay, p.erase, p.cu_seqlens, (p.exclusive, p.normalize, p.scale), shard
    )


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, options, shard = inputs
        q, v, cu_seqlens = tensors[0], tensors[2], tensors[6]
        streams = q.shape[0] if cu_seqlens is None else shard.streams
        documents = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        *prepared, maps, last = torch.ops.flame.delta_rule_part_maps(*tensors, streams, *options)
        update, transition = last.split([v.shape[-1], last.shape[2]], -1)
        if documents > streams:  # the last document began here: nothing of an earlier one is left
            transition = torch.zeros_like(transition)
        incoming = opening_states(shard.carry(update, transition, matrix=True), documents)
        o, opening = torch.ops.flame.delta_rule_part_outputs(*tensors, incoming, *prepared, *options)
        ctx.save_for_backward(*tensors, *prepared, maps, transition, incoming, opening, o)
        ctx.options, ctx.shard, ctx.streams = options, shard, streams
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, vectors, inverse, scores, openings, maps, transition, incoming, opening, o = ctx.saved_tensors
        do, streams = grads[0], ctx.streams
        prepared = (vectors, inverse, scores, openings)
        change = torch.ops.flame.delta_rule_part_changes(*tensors, *prepared, do, streams, *ctx.options)
        closing = ctx.shard.carry_back(change, transition.transpose(-1, -2), matrix=True)
        # Of the documents of a stream, only the last goes on.
        dfinal = F.pad(closing[:, None], (0, 0) * 3 + (len(incoming) // streams - 1, 0)).flatten(0, 1)
        *inputs, cu_seqlens = tensors
        *gradients, _ = torch.ops.flame.delta_rule_backward(
            *inputs, incoming, cu_seqlens, vectors, inverse, scores, opening, maps, o, do, dfinal, *ctx.options
        )
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad)]
        return *wanted, None, None, None


def make_part(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale) -> Call:
    """The call, with a map for every item: also where a sequence has only one, which nothing before or after it needs."""
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale)
    items = c.plan.items.clone()
    items[:, 4] = 0  # neither opens nor ends a sequence
    return replace(c, plan=replace(c.plan, items=items))


@torch.library.custom_op(
    "flame::delta_rule_part_maps",
    mutates_args=(),
    schema=f"({_TENSORS}, int streams, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def part_maps(q, k, v, beta, decay, erase, cu_seqlens, streams, exclusive, normalize, scale):
    """What `prepare` made; from the state before its sequence to that before each item, [I, H, K, V + K] (B | M); each
    item's map; the map of every stream's last sequence [streams, H, K, V + K]."""
    c = make_part(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale)
    p = run_prepare(c)
    width = c.V + c.K
    maps = c.new(c.cut.num_items, c.H, c.K, width, dtype=torch.float32)
    run_forward(p, None, final=maps, maps=True)
    # The map so far is a state of V + K columns that starts as (0 | 1), and that no item adds to in its last K.
    identity = F.pad(torch.eye(c.K, device=q.device), (c.V, 0)).expand(c.sequences, c.H, -1, -1).contiguous()
    update, transition = maps.split([c.V, c.K], -1)
    update = F.pad(update, (0, c.K))
    openings = run_merge(c, torch.cat([update, transition], -1), update, identity, reverse=False, columns=width)
    last = c.plan.first_item[c.sequences // streams :: c.sequences // streams].long() - 1
    return p.vectors, p.inverse, p.scores, openings, maps, transition[last] @ openings[last] + update[last]


@part_maps.register_fake
def _(q, k, v, beta, decay, erase, cu_seqlens, streams, exclusive, normalize, scale):
    cut = cut_of(q, k, v, cu_seqlens)
    H, K, V, M = v.shape[2], k.shape[3], v.shape[3], cut.num_chunks
    vectors = q.new_empty(M, H, ROWS.value, CHUNK, dtype=torch.float32)
    inverse, scores = (q.new_empty(M, H, CHUNK, CHUNK) for _ in range(2))
    items = (cut.num_items, cut.num_items, streams)
    return vectors, inverse, scores, *(q.new_empty(n, H, K, V + K, dtype=torch.float32) for n in items)


@torch.library.custom_op(
    "flame::delta_rule_part_outputs",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor incoming, {_PREPARED}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def part_outputs(
    q, k, v, beta, decay, erase, cu_seqlens, incoming, vectors, inverse, scores, openings, exclusive, normalize, scale
):  # fmt: skip
    """o, and the states before the items [I, H, K, V], of sequences that start with `incoming` [N, H, K, V]."""
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale)
    update, transition = openings.split([c.V, c.K], -1)
    opening = torch.baddbmm(
        update.flatten(0, 1), transition.flatten(0, 1), incoming[c.plan.items[:, 3].long()].flatten(0, 1)
    ).view(update.shape)
    o = c.values()
    run_forward(run_prepare(c, (vectors, inverse, scores)), opening, o=o)
    return o, opening


@part_outputs.register_fake
def _(q, k, v, beta, decay, erase, cu_seqlens, incoming, vectors, inverse, scores, openings, *options):
    return v.new_empty(v.shape), openings.new_empty(*openings.shape[:3], v.shape[3])


@torch.library.custom_op(
    "flame::delta_rule_part_changes",
    mutates_args=(),
    schema=f"({_TENSORS}, {_PREPARED}, Tensor do, int streams, {_OPTIONS}) -> Tensor",
)
def part_changes(
    q, k, v, beta, decay, erase, cu_seqlens, vectors, inverse, scores, openings, do, streams, exclusive, normalize, scale
):  # fmt: skip
    """Gradients [streams, H, K, V] of what every stream's first sequence starts with, were nothing to come after it."""
    c = make_part(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale)
    p = run_prepare(c, (vectors, inverse, scores))
    changes = c.item_states()
    run_reverse(p, as_rows(do.to(v.dtype)), None, changes, None)
    back = openings[..., c.V :].transpose(-1, -2) @ changes
    item = torch.arange(c.cut.num_items, device=q.device)
    first = c.plan.first_item[:: c.sequences // streams][:streams, None]
    end = c.plan.first_item[1 :: c.sequences // streams][:, None]
    own = (item >= first) & (item < end)  # [streams, I]
    return torch.where(own[:, :, None, None, None], back, 0.0).sum(1)


@part_changes.register_fake
def _(q, k, v, beta, decay, erase, cu_seqlens, vectors, inverse, scores, openings, do, streams, *options):
    return openings.new_empty(streams, *openings.shape[1:3], v.shape[3])
