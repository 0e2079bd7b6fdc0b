"""The fast path as operators of torch: `flame::delta_rule_forward` and `..._backward`, with fakes and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from flame.kernels import tiles
from flame.kernels.compile_together import compiled_together
from flame.kernels.delta_rule.plan import CHUNK, Cut, Plan, backward_parts, make_cut, make_plan, part_of, tile_key
from flame.kernels.delta_rule.problem import NORM_EPS, Tied
from flame.kernels.delta_rule.triton_gradients import SUMS, row_gradients, score_gradients
from flame.kernels.delta_rule.triton_key_forms import form_keys, form_keys_by_halves
from flame.kernels.delta_rule.triton_key_gradients import key_decay_row_gradients
from flame.kernels.delta_rule.triton_prepare import KEY, NONE, ROWS, SCALAR, form_scores, invert_systems
from flame.kernels.delta_rule.triton_sweep import forward_sweep, merge_segments, reverse_sweep

OP = "delta_rule"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? decay, Tensor? erase, Tensor? initial_state, Tensor? cu_seqlens"
_OPTIONS = "bool exclusive, bool normalize, float scale"


def delta_rule_triton(p: Tied) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V] of a validated problem."""
    o, final, *_ = torch.ops.flame.delta_rule_forward(
        p.q, p.k, p.v, p.beta, p.decay, p.erase, p.initial_state, p.cu_seqlens, p.exclusive, p.normalize, p.scale
    )
    return o, final


@dataclass(frozen=True)
class Call:
    """Sizes, constants and tensors that the kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor | None
    erase: Tensor | None
    exclusive: bool
    normalize: bool
    scale: float
    cut: Cut
    plan: Plan
    packed: bool

    @property
    def H(self) -> int:
        return self.v.shape[2]

    @property
    def K(self) -> int:
        return self.k.shape[3]

    @property
    def V(self) -> int:
        return self.v.shape[3]

    @property
    def sequences(self) -> int:
        return self.plan.first_item.numel() - 1

    def sizes(self) -> dict[str, int]:
        return {
            "H": self.H, "GROUP": self.H // self.k.shape[2], "K": self.K, "V": self.V, "BK": padded(self.K), "C": CHUNK,
        }  # fmt: skip

    @property
    def decay_kind(self) -> int:
        return (NONE if self.decay is None else SCALAR if self.decay.dim() == 3 else KEY).value

    def kind(self) -> dict[str, int]:
        return {"DECAY": self.decay_kind, "ERASE": self.erase is not None, "EXCLUSIVE": self.exclusive}

    def strides(self, *names: str) -> dict[str, int]:
        """Token and head strides under the kernels' argument names."""
        table = {"q": self.q, "k": self.k, "v": self.v, "a": self.k if self.erase is None else self.erase}
        return {f"stride_{name}{axis}": table[name].stride(at) for name in names for axis, at in (("t", 1), ("h", 2))}

    def precision(self) -> str:
        """Of a product of operands in the input's dtype; only matters for fp32."""
        return "ieee" if self.q.dtype == torch.float32 else "tf32"

    def exact(self) -> str:
        """Of a product of fp32 operands that must stay near fp32: three tf32 products on tensor cores."""
        return "ieee" if self.q.device.type == "cpu" else "tf32x3"

    def tile(self, name: str, default: dict[str, int]) -> dict[str, int]:
        decay = ("none", "scalar", "key")[self.decay_kind]
        key = tile_key(name, decay, self.K, self.V, self.q.dtype, self.erase is not None)
        return dict(tiles.choose(OP, key, default, self.q.device))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=self.q.dtype if dtype is None else dtype)

    def values(self) -> Tensor:
        """[B, T, H, V]; zero where packed documents, which may end before the row does, would leave it unwritten."""
        return self.v.new_zeros(self.v.shape) if self.packed else self.v.new_empty(self.v.shape)

    def chunk_states(self) -> Tensor:
        return self.new(self.cut.num_chunks, self.H, self.K, self.V)

    def item_states(self) -> Tensor:
        return self.new(self.cut.num_items, self.H, self.K, self.V, dtype=torch.float32)


def padded(size: int) -> int:
    """Channels of a tile that holds `size`. Triton 3.6 compiles narrower tiles than 64 to accesses out of bounds."""
    return max(16 if knobs.runtime.interpret else 64, triton.next_power_of_2(size))


def default_value_tile(K: int, V: int) -> int:
    return min(padded(V), 64 if K <= 128 else 32)


def sweep_tile(K: int, V: int) -> dict[str, int]:
    return {"BV": default_value_tile(K, V), "num_warps": 4, "num_stages": 1 if K <= 128 else 2}


def cut_of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Cut:
    documents = None if cu_seqlens is None else cu_seqlens.numel() - 1
    columns = v.shape[2] * -(-v.shape[3] // default_value_tile(k.shape[3], v.shape[3]))
    return make_cut(q.shape[0], q.shape[1], documents, columns, tiles.multiprocessors(q.device))


def parts_of_backward(k: Tensor, v: Tensor, decay: Tensor | None, cut: Cut, packed: bool) -> int:
    """How many parts of the batch the backward takes one after the other. With a decay per key channel it takes all at
    once: there a processor runs two programs of a sweep at a time, and half of the batch leaves it one."""
    if decay is not None and decay.dim() == 4:
        return 1
    return backward_parts(cut, v.shape[0], v.shape[2] * -(-v.shape[3] // 64), packed, k.device)


def make_call(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale, *, cut: Cut | None = None) -> Call:
    cut = cut_of(q, k, v, cu_seqlens) if cut is None else cut
    plan = make_plan(cut, q.shape[0], q.shape[1], cu_seqlens, q.device)
    q, k, v = (as_rows(x) for x in (q, k, v))
    erase = None if erase is None else as_rows(erase)
    beta, decay = (None if x is None else x.contiguous() for x in (beta, decay))
    packed = cu_seqlens is not None
    return Call(q, k, v, beta, decay, erase, exclusive, normalize, scale, cut, plan, packed)


def as_rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that batch and time are one axis and D is dense; a copy only where they are not."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if rows and x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Prepared:
    """What the sweeps read. call: with the rows to sweep over, which a decay per key has already multiplied.

    vectors [M, H, rows, C] fp32; inverse, scores [M, H, C, C]; with a decay per key, total [B, T, H, K] and factor
    [M, H, K], fp32, and moderate [M, H], int32.
    """

    call: Call
    vectors: Tensor
    inverse: Tensor
    scores: Tensor
    total: Tensor | None = None
    factor: Tensor | None = None
    moderate: Tensor | None = None

    def tables(self) -> tuple[Tensor | None, ...]:
        return self.vectors, self.inverse, self.scores, self.factor, self.call.plan.items


def run_prepare(c: Call, saved: tuple[Tensor, Tensor, Tensor] | None = None) -> Prepared:
    """`saved`: vectors, inverse and scores of an earlier preparation of the same call."""
    M, H = c.cut.num_chunks, c.H
    if saved is None:
        vectors = c.new(M, H, ROWS.value, CHUNK, dtype=torch.float32)
        inverse, scores = c.new(M, H, CHUNK, CHUNK), c.new(M, H, CHUNK, CHUNK)
        system = c.new(M, H, CHUNK, CHUNK, dtype=torch.float32)
    else:
        vectors, inverse, scores = saved
        system = None
    made = Prepared(c, vectors, inverse, scores)
    if c.decay_kind == KEY.value:
        made = _form_keys(made, system)
    elif system is not None:
        form_scores[(M * H,)](
            c.q, c.k, c.erase, c.beta, c.decay, c.plan.chunks, vectors, system, scores, c.scale, DECAY=c.decay_kind,
            **_form_options(c), **c.tile("form", {"SLICE": min(64, padded(c.K)), "num_warps": 4, "num_stages": 1}),
        )  # fmt: skip
    if system is not None:
        tile = c.tile("invert", {"num_warps": 1, "num_stages": 1})
        invert_systems[(M * H,)](system, inverse, C=CHUNK, MERGE=c.exact(), **tile)
    return made


def _form_options(c: Call) -> dict[str, Any]:
    sizes = {name: value for name, value in c.sizes().items() if name not in ("V", "BK")}
    kind = {name: value for name, value in c.kind().items() if name != "DECAY"}
    norm = {"HAS_BETA": c.beta is not None, "NORMALIZE": c.normalize, "NORM_EPS": NORM_EPS}
    return {**c.strides("q", "k", "a"), **sizes, **kind, **norm, "DOT": c.precision()}


def _form_keys(made: Prepared, system: Tensor | None) -> Prepared:
    """Rows times their decay; the scores too where there is a `system` [M, H, C, C] to be formed."""
    c = made.call
    M, H, heads = c.cut.num_chunks, c.H, (*c.q.shape[:2], c.H, c.K)
    total, factor = c.new(*heads, dtype=torch.float32), c.new(M, H, c.K, dtype=torch.float32)
    moderate = c.new(M, H, dtype=torch.int32)
    seen, read, written = (c.new(*heads) for _ in range(3))
    options = _form_options(c)
    # Powers of two by which rows can be scaled without leaving the dtype's range.
    steepest = 6.0 if c.q.dtype == torch.float16 else 96.0
    default = {"SLICE": min(64, padded(c.K)), "num_warps": 4, "num_stages": 1}
    form_keys[(M * H,)](
        c.q, c.k, c.erase, c.beta, c.decay, c.plan.chunks, total, factor, moderate, seen, read, written, made.vectors,
        system, made.scores, c.scale, **options, STEEPEST=steepest, SCORES=system is not None,
        **c.tile("form rows" if system is None else "form", default),
    )  # fmt: skip
    if system is not None:
        default = {"SLICE": min(16, padded(c.K)), "num_warps": 1, "num_stages": 1}
        form_keys_by_halves[(M * H,)](
            c.q, c.k, c.erase, c.beta, total, moderate, c.plan.chunks, made.vectors, system, made.scores, c.scale,
            **options, **c.tile("form by halves", default),
        )  # fmt: skip
    rows = replace(c, q=seen, k=written, erase=read)
    return replace(made, call=rows, total=total, factor=factor, moderate=moderate)


def run_forward(
    p: Prepared,
    initial: Tensor | None,
    *,
    final: Tensor | None = None,
    o: Tensor | None = None,
    states: tuple[Tensor, Tensor] | None = None,
    maps: bool = False,
) -> None:
    """One forward sweep: store outputs, or states before the chunks with the writes, or the items' maps into `final`."""
    c = p.call
    name = "maps" if maps else "states" if states is not None else "forward"
    tile = c.tile(name, sweep_tile(c.K, c.V))
    width = c.V + c.K if maps else c.V
    grid = (triton.cdiv(width, tile["BV"]), c.cut.num_items * c.H)
    before, writes = (None, None) if states is None else states
    # Without a decay, take one of e^0: the same kernel, which was tuned.
    kind = c.kind() | {"DECAY": max(c.decay_kind, SCALAR.value)}
    forward_sweep[grid](
        c.q, c.k, c.v, c.k if c.erase is None else c.erase, *p.tables(), initial, final, o, before, writes,
        **c.strides("q", "k", "a", "v"), **c.sizes(), **kind, OUTPUT=o is not None, STATES=states is not None,
        MAP=maps, HAS_INITIAL=initial is not None, HAS_FINAL=final is not None and not maps, DOT=c.precision(), **tile,
    )  # fmt: skip


def run_reverse(
    p: Prepared,
    do: Tensor,
    closing: Tensor | None,
    opening: Tensor | None,
    store: tuple[Tensor, Tensor] | None,
) -> None:
    """One reverse sweep: store gradients of the states after the chunks and dU, or (store None) only each item's dB."""
    c = p.call
    tile = c.tile("reverse" if store else "reverse maps", sweep_tile(c.K, c.V))
    dstates, du = (None, None) if store is None else store
    reverse_sweep[(triton.cdiv(c.V, tile["BV"]), c.cut.num_items * c.H)](
        c.q, c.k, c.k if c.erase is None else c.erase, do, *p.tables(), closing, opening, dstates, du,
        **c.strides("q", "k", "a"), stride_ot=do.stride(1), stride_oh=do.stride(2), **c.sizes(), **c.kind(),
        STORE=store is not None, MAP=store is None, HAS_CLOSING=closing is not None,
        HAS_OPENING=opening is not None and store is not None, DOT=c.precision(), **tile,
    )  # fmt: skip


def run_merge(
    c: Call, maps: Tensor, changes: Tensor, initial: Tensor | None, reverse: bool, columns: int | None = None
) -> Tensor:
    """States before the items, or (reverse) gradients of the states after them: [I, H, K, V] fp32.

    columns: V, if the states that are chained are wider than values.
    """
    V = c.V if columns is None else columns
    opening = c.new(c.cut.num_items, c.H, c.K, V, dtype=torch.float32)
    default = {"BV": 32 if c.K <= 128 else 16, "PART": min(64, padded(c.K)), "num_warps": 4, "num_stages": 1}
    tile = c.tile("merge", default)
    merge_segments[(triton.cdiv(V, tile["BV"]), c.sequences * c.H)](
        maps, changes, c.plan.first_item, initial, opening, changes.shape[-1], H=c.H, K=c.K, V=V, BK=padded(c.K),
        REVERSE=reverse, HAS_INITIAL=initial is not None, PRECISION=c.exact(), **tile,
    )  # fmt: skip
    return opening


def _then(inputs, outputs):
    *tensors, exclusive, normalize, scale = inputs
    o, _, *saved = outputs
    _backward(*tensors, *saved, o, o, None, exclusive, normalize, scale)


@torch.library.custom_op(
    "flame::delta_rule_forward",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@compiled_together(_then)
def forward(q, k, v, beta, decay, erase, initial_state, cu_seqlens, exclusive, normalize, scale):
    """o, final state, what `prepare` made, and where time was cut the items' opening states and maps (else empty)."""
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, exclusive, normalize, scale)
    initial = None if initial_state is None else initial_state.float().contiguous()
    p = run_prepare(c)
    o = c.values()
    final = c.new(c.sequences, c.H, c.K, c.V, dtype=torch.float32)
    opening = maps = c.new(0, dtype=torch.float32)
    before = initial
    if c.cut.cut:
        maps = c.new(c.cut.num_items, c.H, c.K, c.V + c.K, dtype=torch.float32)
        run_forward(p, None, final=maps, maps=True)
        before = opening = run_merge(c, maps, maps, initial, reverse=False)
    run_forward(p, before, final=final, o=o)
    return o, final, p.vectors, p.inverse, p.scores, opening, maps if c.cut.cut else maps.clone()


@forward.register_fake
def _(q, k, v, beta, decay, erase, initial_state, cu_seqlens, exclusive, normalize, scale):
    cut = cut_of(q, k, v, cu_seqlens)
    H, K, V, M = v.shape[2], k.shape[3], v.shape[3], cut.num_chunks
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shapes = [(sequences, H, K, V), (M, H, ROWS.value, CHUNK)]
    shapes += [(cut.num_items, H, K, V), (cut.num_items, H, K, V + K)] if cut.cut else [(0,), (0,)]
    final, vectors, opening, maps = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    inverse, scores = (q.new_empty(M, H, CHUNK, CHUNK) for _ in range(2))
    return v.new_empty(v.shape), final, vectors, inverse, scores, opening, maps


@torch.library.custom_op(
    "flame::delta_rule_backward",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor vectors, Tensor inverse, Tensor scores, Tensor opening, Tensor maps, Tensor o, Tensor do, "
        f"Tensor? dfinal, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def backward(*inputs):
    """Gradients of q, k, v, beta, decay, erase and initial_state; empty where there is no such tensor."""
    return _backward(*inputs)


def _backward(
    q, k, v, beta, decay, erase, initial_state, cu_seqlens, vectors, inverse, scores, opening, maps, o, do, dfinal, *options
):  # fmt: skip
    tensors = (q, k, v, beta, decay, erase, initial_state, vectors, inverse, scores, opening, maps, o, do, dfinal)
    cut = cut_of(q, k, v, cu_seqlens)
    parts = parts_of_backward(k, v, decay, cut, cu_seqlens is not None)
    if parts == 1:
        return tuple(_backward_rows(cut, cu_seqlens, tensors, None, options))
    share = replace(cut, num_chunks=cut.num_chunks // parts, num_items=cut.num_items // parts)
    gradients = [*_gradients_of(tensors[:6]), _gradient_of_state(tensors)]
    for part in range(parts):
        _backward_rows(share, None, part_of(tensors, part, parts), part_of(gradients, part, parts), options)
    return tuple(gradients)


def _gradients_of(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Room for the gradients of the inputs [B, T, H, ...]; empty where there is no such input."""
    empty = inputs[0].new_empty(0)
    return [empty.clone() if x is None else x.new_empty(x.shape) for x in inputs]


def _gradient_of_state(tensors: Sequence[Tensor | None]) -> Tensor:
    q, initial_state = tensors[0], tensors[6]
    return q.new_empty((0,) if initial_state is None else initial_state.shape, dtype=torch.float32)


def _backward_rows(cut, cu_seqlens, tensors, into, options) -> Sequence[Tensor]:
    """The gradients of the tensors that are differentiated, of a part of the batch; written to `into` if that is given."""
    q, k, v, beta, decay, erase, initial_state, vectors, inverse, scores, opening, maps, o, do, dfinal = tensors
    c = make_call(q, k, v, beta, decay, erase, cu_seqlens, *options, cut=cut)
    p = run_prepare(c, (vectors, inverse, scores))
    do = as_rows(do.to(v.dtype))
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    before = opening if c.cut.cut else None if initial_state is None else initial_state.float().contiguous()
    states, writes = c.chunk_states(), v.new_empty(v.shape)
    run_forward(p, before, states=(states, writes))
    closing = dfinal
    if c.cut.cut:
        changes = c.item_states()
        run_reverse(p, do, None, changes, None)
        closing = run_merge(c, maps, changes, dfinal, reverse=True)
    dinitial = _gradient_of_state(tensors) if into is None else into[-1]
    dstates, du = c.chunk_states(), v.new_empty(v.shape)
    run_reverse(p, do, closing, None if initial_state is None else dinitial, (dstates, du))
    p = replace(p, call=c)  # lets go of the rows that a decay per key has multiplied
    into = [*_gradients_of(tensors[:6]), dinitial] if into is None else into
    run_gradients(c, p, (o, do), (states, dstates, writes, du), into)
    return into


def run_gradients(
    c: Call, p: Prepared, output: tuple[Tensor, Tensor], pieces: tuple[Tensor, ...], into: Sequence[Tensor]
) -> None:
    """Fill dq, dk, dv, dbeta, ddecay, derase; nothing is in `into` where there is no such tensor. c: the call as it was
    made; output: o and do; pieces: states, their gradients, writes, dU."""
    o, do = output
    heads = (*c.q.shape[:2], c.H)
    grouped = c.q.shape[2] != c.H
    dq, dk, derase = (c.new(*heads, c.K) if grouped and x.numel() else x for x in (into[0], into[1], into[5]))
    dv = into[2]
    M, H, rows = c.cut.num_chunks, c.H, c.q.shape[0] * c.q.shape[1]
    default = {"TK": min(64, padded(c.K)), "BV": 64, "num_warps": 4, "num_stages": 1}
    tile = c.tile("rows", default)
    parts = triton.cdiv(c.K, tile["TK"])
    # Every tile of keys makes a part of the gradients that are sums over key channels.
    dbeta = c.new(0) if c.beta is None else c.new(parts, *heads, dtype=torch.float32)
    shape = {NONE.value: (0,), SCALAR.value: (parts, *heads), KEY.value: (*heads, c.K)}[c.decay_kind]
    ddecay = into[4] if c.decay_kind == KEY.value else c.new(*shape, dtype=torch.float32)
    if c.packed:  # the documents may end before the row does
        for x in (dq, dk, dv, derase, dbeta, ddecay):
            x.zero_()
    sizes = {name: value for name, value in c.sizes().items() if name != "BK"}
    common = {"DOT": c.precision(), "stride_ot": do.stride(1), "stride_oh": do.stride(2)}
    states, dstates, writes, du = pieces
    dscores, dsystem = c.new(M, H, CHUNK, CHUNK), c.new(M, H, CHUNK, CHUNK)
    sums = c.new(M, H, SUMS.value, CHUNK, dtype=torch.float32)
    score_gradients[(M * H,)](
        c.v, o, do, p.vectors, c.plan.chunks, writes, du, dv, dscores, dsystem, sums, **c.strides("v"), **c.kind(),
        H=H, V=c.V, C=CHUNK, **common, **c.tile("scores", {"BV": 64, "num_warps": 8, "num_stages": 1}),
    )  # fmt: skip
    tensors = (
        p.vectors, c.plan.chunks, states, dstates, writes, du, dscores, dsystem, sums, dq, dk, derase, dbeta, ddecay,
    )  # fmt: skip
    options = {"HAS_BETA": c.beta is not None, "NORMALIZE": c.normalize, **c.strides("q", "k", "a"), **sizes, **common}
    erase = c.k if c.erase is None else c.erase
    if p.total is None:
        row_gradients[(M * H * parts,)](
            c.q, c.k, erase, do, *tensors, c.scale, rows, **c.kind(), **options, **tile,
        )  # fmt: skip
    else:
        kind = {name: value for name, value in c.kind().items() if name != "DECAY"}
        default = {"TK": tile["TK"], "BV": 64, "num_warps": 4, "num_stages": 1}
        for halves, chosen in enumerate((tile, c.tile("rows by halves", default))):
            key_decay_row_gradients[(M * H * parts,)](
                c.q, c.k, erase, do, p.total, p.moderate, *tensors, c.scale, rows, HALVES=halves, **kind, **options,
                **chosen,
            )  # fmt: skip
    if grouped:
        for gradient, whole in ((into[0], dq), (into[1], dk), (into[5], derase)):
            if gradient.numel():
                torch.sum(whole.unflatten(2, (gradient.shape[2], -1)), 3, out=gradient)
    if c.beta is not None:
        into[3].copy_(dbeta.sum(0))
    if c.decay_kind == SCALAR.value:
        into[4].copy_(ddecay.sum(0))


@backward.register_fake
def _(
    q, k, v, beta, decay, erase, initial_state, cu_seqlens, vectors, inverse, scores, opening, maps, o, do, dfinal,
    exclusive, normalize, scale,
):  # fmt: skip
    nothing = q.new_empty(0, dtype=torch.float32)
    full = [x.new_empty(x.shape) if x is not None else nothing.clone() for x in (q, k, v, beta, decay, erase)]
    dinitial = nothing if initial_state is None else initial_state.new_empty(initial_state.shape, dtype=torch.float32)
    return *full, dinitial


def _setup_context(ctx, inputs, output):
    *tensors, exclusive, normalize, scale = inputs
    ctx.save_for_backward(*tensors, *output[2:], output[0])
    ctx.options = exclusive, normalize, scale
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or zeros stand in for the gradients of what is only saved


def _autograd(ctx, do, dfinal, *_):
    tensors = ctx.saved_tensors
    v, initial_state = tensors[2], tensors[6]
    do = torch.zeros_like(v) if do is None else do
    *gradients, dinitial = torch.ops.flame.delta_rule_backward(*tensors, do, dfinal, *ctx.options)
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    every = [*gradients, dinitial, None, None, None, None]
    return tuple(g if need else None for g, need in zip(every, ctx.needs_input_grad))


forward.register_autograd(_autograd, setup_context=_setup_context)
