"""The fast path on a part of a sequence that is cut over ranks.

What a rank's tokens do to the state, S_out = M S_in + B, and to the gradient that comes back, dS_in = M^T dS_out + C, is found
by the same sweeps that cut long rows into segments, before anything arrives. After one exchange of (M, B) the plain sweep runs
from the state that comes in, after one of (M, C) the plain backward runs from the gradient that comes back. So the ranks do
what one process does on their tokens.

The exchanges lie inside the two ops, which the compiler takes whole: in a checkpointed block it drops all that the first one
makes and makes it again, where of a chain of ops it would keep what lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from flame.kernels.sequence import SequenceShard, group_of, opening_states

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? decay, Tensor? erase, Tensor? cu_seqlens"
_OPTIONS = "bool exclusive, bool normalize, float scale"
# A SequenceShard in words of a schema.
_SHARD = "Tensor before, str group, int rank, int size, int streams, str? exchange"
_SAVED = (
    "Tensor o, Tensor vectors, Tensor inverse, Tensor scores, Tensor openings, Tensor maps, Tensor transition, "
    "Tensor incoming, Tensor opening"
)


def delta_rule_triton_part(p: Tied, shard: SequenceShard) -> Tensor:
    """o [B, T, H, V] of this rank's part of a validated problem without states."""
    streams = p.q.shape[0] if p.cu_seqlens is None else shard.streams
    where = (shard.before, shard.group.group_name, shard.rank, shard.size, streams, shard.exchange)
    tensors = (p.q, p.k, p.v, p.beta, p.decay, p.erase, p.cu_seqlens)
    o, *_ = torch.ops.flame.delta_rule_part(*tensors, *where, p.exclusive, p.normalize, p.scale)
    return o


def _shard_of(before: Tensor, group: str, rank: int, size: int, streams: int, exchange: str | None) -> SequenceShard:
    return SequenceShard(group_of(group), rank, size, before, streams=streams, exchange=exchange)


@dataclass(frozen=True)
class _Maps:
    """What the tokens do to a state, before any is known.

    Attributes:
        prepared: what `run_prepare` made.
        openings: [I, H, K, V + K], (B | M) from the state before its sequence to that before each item.
        maps: [I, H, K, V + K] of each item.
        last: [streams, H, K, V + K] of every stream's last sequence.
    """

    prepared: tuple[Tensor, Tensor, Tensor]
    openings: Tensor
    maps: Tensor
    last: Tensor


def _with_maps(c: Call) -> Call:
    """The call, with a map for every item: also where a sequence has only one, which nothing before or after it needs."""
    items = c.plan.items.clone()
    items[:, 4] = 0  # neither opens nor ends a sequence
    return replace(c, plan=replace(c.plan, items=items))


def _make_maps(call: Call, streams: int) -> _Maps:
    c = _with_maps(call)
    p = run_prepare(c)
    width = c.V + c.K
    maps = c.new(c.cut.num_items, c.H, c.K, width, dtype=torch.float32)
    run_forward(p, None, final=maps, maps=True)
    # The map so far is a state of V + K columns that starts as (0 | 1), and that no item adds to in its last K.
    identity = F.pad(torch.eye(c.K, device=c.q.device), (c.V, 0)).expand(c.sequences, c.H, -1, -1).contiguous()
    update, transition = maps.split([c.V, c.K], -1)
    update = F.pad(update, (0, c.K))
    openings = run_merge(c, torch.cat([update, transition], -1), update, identity, reverse=False, columns=width)
    last = c.plan.first_item[c.sequences // streams :: c.sequences // streams].long() - 1
    return _Maps((p.vectors, p.inverse, p.scores), openings, maps, transition[last] @ openings[last] + update[last])


def _openings(c: Call, openings: Tensor, incoming: Tensor) -> Tensor:
    """The states before the items [I, H, K, V] of sequences that start with `incoming` [N, H, K, V]."""
    update, transition = openings.split([c.V, c.K], -1)
    before = incoming[c.plan.items[:, 3].long()]
    opening = torch.baddbmm(update.flatten(0, 1), transition.flatten(0, 1), before.flatten(0, 1))
    return opening.view(update.shape)


def _change(call: Call, prepared: Sequence[Tensor], openings: Tensor, do: Tensor, streams: int) -> Tensor:
    """Gradients [streams, H, K, V] of what every stream's first sequence starts with, were nothing to come after it."""
    c = _with_maps(call)
    changes = c.item_states()
    run_reverse(run_prepare(c, prepared), as_rows(do.to(c.v.dtype)), None, changes, None)
    back = openings[..., c.V :].transpose(-1, -2) @ changes
    item = torch.arange(c.cut.num_items, device=c.q.device)
    first = c.plan.first_item[:: c.sequences // streams][:streams, None]
    end = c.plan.first_item[1 :: c.sequences // streams][:, None]
    own = (item >= first) & (item < end)  # [streams, I]
    return torch.where(own[:, :, None, None, None], back, 0.0).sum(1)


@torch.library.custom_op(
    "flame::delta_rule_part",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SHARD}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 9)})",
)
def forward(q, k, v, beta, decay, erase, cu_seqlens, before, group, rank, size, streams, exchange, *options):
    """o and what the backward needs: what `prepare` made, `_Maps.openings` and `.maps`, what the rank does to a state that
    comes in [streams, H, K, K], the states [N, H, K, V] that come in, and those before the items [I, H, K, V]."""
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, *options)
    made = _make_maps(c, streams)
    update, transition = (x.contiguous() for x in made.last.split([c.V, c.K], -1))
    if c.sequences > streams:  # the last document began here: nothing of an earlier one is left
        transition = torch.zeros_like(transition)
    shard = _shard_of(before, group, rank, size, streams, exchange)
    incoming = opening_states(shard.carry(update, transition, matrix=True), c.sequences).contiguous()
    opening = _openings(c, made.openings, incoming)
    o = c.values()
    run_forward(run_prepare(c, made.prepared), opening, o=o)
    return o, *made.prepared, made.openings, made.maps, transition, incoming, opening


@forward.register_fake
def _(q, k, v, beta, decay, erase, cu_seqlens, before, group, rank, size, streams, exchange, *options):
    cut = cut_of(q, k, v, cu_seqlens)
    H, K, V, M, items = v.shape[2], k.shape[3], v.shape[3], cut.num_chunks, cut.num_items
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    vectors = q.new_empty(M, H, ROWS.value, CHUNK, dtype=torch.float32)
    inverse, scores = (q.new_empty(M, H, CHUNK, CHUNK) for _ in range(2))
    states = ((items, V + K), (items, V + K), (streams, K), (sequences, V), (items, V))
    rest = (q.new_empty(count, H, K, width, dtype=torch.float32) for count, width in states)
    return v.new_empty(v.shape), vectors, inverse, scores, *rest


@torch.library.custom_op(
    "flame::delta_rule_part_backward",
    mutates_args=(),
    schema=f"(Tensor do, {_SAVED}, {_TENSORS}, {_SHARD}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 6)})",
)
def backward(
    do, o, vectors, inverse, scores, openings, maps, transition, incoming, opening, q, k, v, beta, decay, erase,
    cu_seqlens, before, group, rank, size, streams, exchange, *options,
):  # fmt: skip
    """Gradients of q, k, v, beta, decay and erase; empty where there is no such tensor."""
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, *options)
    prepared = (vectors, inverse, scores)
    shard = _shard_of(before, group, rank, size, streams, exchange)
    change = _change(c, prepared, openings, do, streams)
    closing = shard.carry_back(change, transition.transpose(-1, -2), matrix=True)
    # Of the documents of a stream, only the last goes on.
    dfinal = F.pad(closing[:, None], (0, 0) * 3 + (c.sequences // streams - 1, 0)).flatten(0, 1)
    *gradients, _ = torch.ops.flame.delta_rule_backward(
        q, k, v, beta, decay, erase, incoming, cu_seqlens, *prepared, opening, maps, o, do, dfinal, *options
    )
    return tuple(gradients)


@backward.register_fake
def _(do, o, vectors, inverse, scores, openings, maps, transition, incoming, opening, *rest):
    return tuple(o.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in rest[:6])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros stand in for the gradients of what is only saved


def _autograd(ctx, do, *_):
    nothing = (None,) * (2 + len(ctx.rest))
    if do is None:
        return (None,) * 6 + nothing
    gradients = torch.ops.flame.delta_rule_part_backward(do, *ctx.saved_tensors, *ctx.rest)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad)), *nothing


forward.register_autograd(_autograd, setup_context=_setup_context)
