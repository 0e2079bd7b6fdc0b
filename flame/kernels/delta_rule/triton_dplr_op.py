"""Diagonal plus low rank on the fast path: `flame::dplr_forward` and `..._backward`, with fakes and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flame.kernels.compile_together import compiled_together
from flame.kernels.delta_rule.plan import CHUNK, LAUNCHES, make_plan
from flame.kernels.delta_rule.problem import Untied
from flame.kernels.delta_rule.triton_dplr import (
    MATRICES,
    form_dplr,
    form_dplr_by_halves,
    forward_dplr,
    reverse_dplr,
)
from flame.kernels.delta_rule.triton_dplr_gradients import gradients_dplr
from flame.kernels.delta_rule.triton_op import Call, cut_of, padded, run_merge, sweep_tile
from flame.kernels.delta_rule.triton_prepare import invert_systems

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor decay, Tensor? initial_state, Tensor? cu_seqlens"


def dplr_triton(p: Untied) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V] of a validated problem."""
    o, final, *_ = torch.ops.flame.dplr_forward(
        p.q, p.k, p.v, p.a, p.b, p.decay.float(), p.initial_state, p.cu_seqlens, p.scale
    )
    return o, final


@dataclass(frozen=True)
class Rows:
    """What the sweeps read: seen, read, keys, backs [B, T, H, K], factor [M, H, K] fp32, inverse [M, H, C, C], scores
    [M, H, 3, C, C]; and for the gradients total [B, T, H, K] fp32, moderate [M, H]."""

    call: Call
    seen: Tensor
    read: Tensor
    keys: Tensor
    backs: Tensor
    factor: Tensor
    total: Tensor
    moderate: Tensor
    inverse: Tensor
    scores: Tensor


def make_call(q, k, v, a, decay, cu_seqlens, scale) -> Call:
    """A Call whose erase key is `a`; everything contiguous."""
    cut = cut_of(q, k, v, cu_seqlens)
    plan = make_plan(cut, q.shape[0], q.shape[1], cu_seqlens, q.device)
    q, k, v, a, decay = (x.contiguous() for x in (q, k, v, a, decay))
    return Call(q, k, v, None, decay, a, True, False, scale, cut, plan, cu_seqlens is not None)


def run_form(c: Call, b: Tensor, saved: tuple[Tensor, Tensor] | None = None) -> Rows:
    """`saved`: inverse and scores of an earlier preparation of the same call."""
    M, H, heads = c.cut.num_chunks, c.H, (*c.q.shape[:2], c.H, c.K)
    total, factor = c.new(*heads, dtype=torch.float32), c.new(M, H, c.K, dtype=torch.float32)
    moderate = c.new(M, H, dtype=torch.int32)
    seen, read, keys, backs = (c.new(*heads) for _ in range(4))
    inverse = scores = system = None
    if saved is None:
        inverse, scores = c.new(M, H, CHUNK, CHUNK), c.new(M, H, MATRICES.value, CHUNK, CHUNK)
        system = c.new(M, H, CHUNK, CHUNK, dtype=torch.float32)
    # Powers of two by which rows can be scaled without leaving the dtype's range.
    steepest = 6.0 if c.q.dtype == torch.float16 else 96.0
    sizes = {"H": H, "K": c.K, "C": CHUNK, "DOT": c.precision()}
    default = {"SLICE": min(64, padded(c.K)), "num_warps": 4, "num_stages": 1}
    form_dplr[(M * H,)](
        c.q, c.k, c.erase, b, c.decay, c.plan.chunks, total, factor, moderate, seen, read, keys, backs, scores, system,
        c.scale, **sizes, STEEPEST=steepest, SCORES=saved is None,
        **c.tile("dplr form" if saved is None else "dplr gate", default),
    )  # fmt: skip
    if saved is not None:
        return Rows(c, seen, read, keys, backs, factor, total, moderate, *saved)
    form_dplr_by_halves[(M * H,)](
        c.q, c.k, c.erase, b, total, moderate, c.plan.chunks, scores, system, c.scale, **sizes,
        **c.tile("dplr form by halves", default | {"num_warps": 8}),
    )  # fmt: skip
    tile = c.tile("invert", {"num_warps": 1, "num_stages": 1})
    invert_systems[(M * H,)](system, inverse, C=CHUNK, MERGE=c.exact(), **tile)
    return Rows(c, seen, read, keys, backs, factor, total, moderate, inverse, scores)


def run_forward(
    r: Rows,
    initial: Tensor | None,
    *,
    final: Tensor | None = None,
    o: Tensor | None = None,
    states: tuple[Tensor, Tensor] | None = None,
    maps: bool = False,
) -> None:
    """One forward sweep: store outputs, or states before the chunks with Z, or the items' maps into `final`."""
    c = r.call
    tile = c.tile(
        "dplr maps" if maps else "dplr states" if states is not None else "dplr forward", sweep_tile(c.K, c.V)
    )
    before, writes = (None, None) if states is None else states
    width = c.V + c.K if maps else c.V
    forward_dplr[(triton.cdiv(width, tile["BV"]), c.cut.num_items * c.H)](
        r.seen, r.read, r.keys, r.backs, c.v, r.inverse, r.scores, r.factor, c.plan.items, initial, final, o, before,
        writes, H=c.H, K=c.K, V=c.V, BK=padded(c.K), C=CHUNK, OUTPUT=o is not None, STATES=states is not None, MAP=maps,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None and not maps, DOT=c.precision(), **tile,
    )  # fmt: skip


def run_reverse(
    r: Rows, do: Tensor, closing: Tensor | None, opening: Tensor | None, store: tuple[Tensor, Tensor] | None
) -> None:
    """One reverse sweep: store gradients of the states after the chunks and dX, or (store None) only each item's dB."""
    c = r.call
    tile = c.tile("dplr reverse" if store else "dplr reverse maps", sweep_tile(c.K, c.V))
    dstates, dx = (None, None) if store is None else store
    reverse_dplr[(triton.cdiv(c.V, tile["BV"]), c.cut.num_items * c.H)](
        r.seen, r.read, r.backs, do, r.inverse, r.scores, r.factor, c.plan.items, closing, opening, dstates, dx, H=c.H,
        K=c.K, V=c.V, BK=padded(c.K), C=CHUNK, STORE=store is not None, MAP=store is None,
        HAS_CLOSING=closing is not None, HAS_OPENING=opening is not None and store is not None, DOT=c.precision(), **tile,
    )  # fmt: skip


def run_gradients(r: Rows, b: Tensor, do: Tensor, pieces: tuple[Tensor, ...]) -> list[Tensor]:
    """dq, dk, dv, da, db, ddecay; pieces: states, their gradients, Z, dX."""
    c = r.call
    states, dstates, writes, dx = pieces
    empty = torch.zeros_like if c.packed else torch.empty_like  # the documents may end before the row does
    dq, dk, dv, da, db, ddecay = (empty(x) for x in (c.q, c.k, c.v, c.erase, b, c.decay))
    default = {"TK": min(64, padded(c.K)), "BV": min(64, padded(c.V)), "num_warps": 4, "num_stages": 1}
    for halves, name in enumerate(("dplr gradients", "dplr gradients by halves")):
        for parts in LAUNCHES:
            tile = c.tile(f"{name} {'+'.join(parts).lower()}", default)
            chosen = {part: part in parts for part in ("READS", "WRITES", "VALUES")}
            gradients_dplr[(c.cut.num_chunks * c.H * triton.cdiv(c.K, tile["TK"]),)](
                c.q, c.k, c.erase, b, c.v, do, writes, dx, r.total, r.moderate, c.plan.chunks, r.keys, r.scores, states,
                dstates, dq, dk, da, db, dv, ddecay, c.scale, H=c.H, K=c.K, V=c.V, C=CHUNK, HALVES=halves,
                DOT=c.precision(), **chosen, **tile,
            )  # fmt: skip
    return [dq, dk, dv, da, db, ddecay]


def _then(inputs, outputs):
    o, _, *saved = outputs
    _backward(*inputs[:-1], *saved, o, None, inputs[-1])


@torch.library.custom_op(
    "flame::dplr_forward",
    mutates_args=(),
    schema=f"({_TENSORS}, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@compiled_together(_then)
def forward(q, k, v, a, b, decay, initial_state, cu_seqlens, scale):
    """o, final state, inverse, scores, and where time was cut the items' opening states and maps (else empty)."""
    c = make_call(q, k, v, a, decay, cu_seqlens, scale)
    initial = None if initial_state is None else initial_state.float().contiguous()
    r = run_form(c, b.contiguous())
    o = c.values()
    final = c.new(c.sequences, c.H, c.K, c.V, dtype=torch.float32)
    opening, maps = (c.new(0, dtype=torch.float32) for _ in range(2))
    before = initial
    if c.cut.cut:
        maps = c.new(c.cut.num_items, c.H, c.K, c.V + c.K, dtype=torch.float32)
        run_forward(r, None, final=maps, maps=True)
        before = opening = run_merge(c, maps, maps, initial, reverse=False)
    run_forward(r, before, final=final, o=o)
    return o, final, r.inverse, r.scores, opening, maps


@forward.register_fake
def _(q, k, v, a, b, decay, initial_state, cu_seqlens, scale):
    cut = cut_of(q, k, v, cu_seqlens)
    H, K, V, M = v.shape[2], k.shape[3], v.shape[3], cut.num_chunks
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shapes: list[tuple[int, ...]] = [(sequences, H, K, V)]
    shapes += [(cut.num_items, H, K, V), (cut.num_items, H, K, V + K)] if cut.cut else [(0,), (0,)]
    final, opening, maps = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    inverse, scores = q.new_empty(M, H, CHUNK, CHUNK), q.new_empty(M, H, MATRICES.value, CHUNK, CHUNK)
    return v.new_empty(v.shape), final, inverse, scores, opening, maps


@torch.library.custom_op(
    "flame::dplr_backward",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor inverse, Tensor scores, Tensor opening, Tensor maps, Tensor do, Tensor? dfinal, "
        "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def backward(*inputs):
    """Gradients of q, k, v, a, b, decay and initial_state; empty where there is none."""
    return _backward(*inputs)


def _backward(q, k, v, a, b, decay, initial_state, cu_seqlens, inverse, scores, opening, maps, do, dfinal, scale):
    c, b = make_call(q, k, v, a, decay, cu_seqlens, scale), b.contiguous()
    r = run_form(c, b, (inverse, scores))
    do = do.to(v.dtype).contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    before = opening if c.cut.cut else None if initial_state is None else initial_state.float().contiguous()
    states, writes = c.chunk_states(), c.v.new_empty(v.shape)
    run_forward(r, before, states=(states, writes))
    closing = dfinal
    if c.cut.cut:
        changes = c.item_states()
        run_reverse(r, do, None, changes, None)
        closing = run_merge(c, maps, changes, dfinal, reverse=True)
    dinitial = c.new(0, dtype=torch.float32)
    if initial_state is not None:
        dinitial = c.new(*initial_state.shape, dtype=torch.float32)
    dstates, dx = c.chunk_states(), c.v.new_empty(v.shape)
    run_reverse(r, do, closing, None if initial_state is None else dinitial, (dstates, dx))
    return *run_gradients(r, b, do, (states, dstates, writes, dx)), dinitial


@backward.register_fake
def _(q, k, v, a, b, decay, initial_state, cu_seqlens, inverse, scores, opening, maps, do, dfinal, scale):
    full = [x.new_empty(x.shape) for x in (q, k, v, a, b, decay)]
    return *full, q.new_empty((0,) if initial_state is None else initial_state.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output[2:])
    ctx.scale = inputs[-1]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or zeros stand in for the gradients of what is only saved


def _autograd(ctx, do, dfinal, *_):
    tensors = ctx.saved_tensors
    v, initial_state = tensors[2], tensors[6]
    do = torch.zeros_like(v) if do is None else do
    *gradients, dinitial = torch.ops.flame.dplr_backward(*tensors, do, dfinal, ctx.scale)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    every = [*gradients, dinitial, None, None]
    return tuple(g if need else None for g, need in zip(every, ctx.needs_input_grad))


forward.register_autograd(_autograd, setup_context=_setup_context)
