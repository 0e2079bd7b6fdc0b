"""The fast path: `flame::polynomial_forward` and `flame::polynomial_backward`, with fakes and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels import tiles
from flame.kernels.compile_together import compiled_together
from flame.kernels.linear_attention.triton_layout import (
    Items,
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    precision,
    segment_bounds,
    strides,
)
from flame.kernels.linear_attention.triton_op import as_rows
from flame.kernels.linear_attention.triton_states import scan_segments
from flame.kernels.polynomial_attention.triton_blocks import (
    GROUP,
    SIZE,
    D,
    block_dkv,
    block_dq,
    block_forward,
    block_sums,
    row_products,
)

WIDEST_VALUES = 128
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens"
_SCORE = "float c0, float c1, float c2, float eps"
_SCHEMAS = {
    "polynomial_forward": f"({_TENSORS}, {_SCORE}) -> (Tensor, Tensor, Tensor)",
    "polynomial_backward": (
        f"({_TENSORS}, Tensor o, Tensor rest, Tensor denominator, Tensor do, {_SCORE}) -> (Tensor, Tensor, Tensor)"
    ),
}
DEFAULT_TILES = {
    "sums": {"BT": 64, "num_warps": 4, "num_stages": 2},
    "forward": {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 2},
    "dq": {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 2},
    "dkv": {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 2},
    "block": {"ROWS": 512},
}


def supported(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these sizes; the torch form takes the others."""
    return q.shape[-1] <= D.value and v.shape[-1] <= WIDEST_VALUES and v.dtype != torch.float64


def polynomial_triton(
    q: Tensor, k: Tensor, v: Tensor, coefficients: tuple[float, float, float], eps: float, cu_seqlens: Tensor | None
) -> Tensor:
    """o [B, T, H, V] in v's dtype; no states."""
    q, k = (x.to(v.dtype) for x in (q, k))
    return _Polynomial.apply(q, k, v, cu_seqlens, *(float(c) for c in coefficients), float(eps))


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout

    @staticmethod
    def make(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Call:
        q, k, v = (as_rows(x) for x in (q, k, v))
        B, T, H, K = (int(n) for n in q.shape)
        V = int(v.shape[-1])
        rows = _tile("block", K, V, v)["ROWS"]
        return Call(q, k, v, Layout("none", B, T, H, K, V, 1, K**-0.5, _blocks(B, T, rows, cu_seqlens)))

    @property
    def settings(self) -> dict[str, object]:
        layout = self.layout
        # fp16 has no room for sums of products of keys over a long sequence: 16-bit operands are bf16.
        dot = {torch.float32: "fp32"}.get(self.v.dtype, "bf16")
        shared = {"K": layout.K, "V": layout.V, "BV": power_of_2(layout.V), "DOT": _dtypes()[dot]}
        return {**item_settings(layout, self.q), **shared, "PRECISION": precision(self.v)}

    @property
    def tensors(self) -> dict[str, object]:
        pointers = {"q_ptr": self.q, "k_ptr": self.k, "v_ptr": self.v}
        return {**pointers, **strides(q=self.q, k=self.k, v=self.v), "scale": self.layout.scale}

    def grid(self, tile: tiles.Tile) -> tuple[int, int]:
        return ceil_div(self.layout.items.segment, tile["BT"]), self.layout.items.count * self.layout.heads

    def tile(self, name: str) -> tiles.Tile:
        return _tile(name, self.layout.K, self.layout.V, self.v)

    @property
    def has_state(self) -> bool:
        return self.layout.items.starts is not None or self.layout.items.per_row > 1

    def states(self, rows: Tensor, values: Tensor, gradient: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Sums over the blocks before each block, or in reverse after it where `gradient` (denominator, delta) is given."""
        layout, items = self.layout, self.layout.items
        width = SIZE.value * (layout.V + 1)
        new = torch.empty if items.starts is None else torch.zeros  # surplus items hold no row
        state = new(items.count, layout.heads, width, dtype=torch.float32, device=rows.device)
        denominator, delta = gradient or (state, state)
        block_sums[(D.value // GROUP.value + 1, items.count * layout.heads)](
            k_ptr=rows,
            v_ptr=values,
            denominator_ptr=denominator,
            delta_ptr=delta,
            state_ptr=state,
            **strides(k=rows, v=values),
            GRADIENT=gradient is not None,
            **self.settings,
            **self.tile("sums"),
        )
        scan_segments[(ceil_div(width, 1024), layout.sequences * layout.heads)](
            state_ptr=state,
            total_ptr=state,
            initial_ptr=state,
            final_ptr=state,
            first_ptr=state if items.first is None else items.first,
            segments=items.per_row,
            H=layout.heads,
            K=width,
            V=1,
            BLOCK=1024,
            DECAY="none",
            REVERSE=gradient is not None,
            VARLEN=items.starts is not None,
            HAS_INITIAL=False,
            STORE_FINAL=False,
            num_warps=4,
        )
        return state


def _dtypes() -> dict[str, object]:
    import triton.language as tl

    return {"fp32": tl.float32, "bf16": tl.bfloat16}


def _tile(name: str, K: int, V: int, x: Tensor) -> tiles.Tile:
    key = tiles.key(name, K=K, V=V, dtype=x.dtype)
    return tiles.choose("polynomial_attention", key, DEFAULT_TILES[name], x.device)


def _blocks(batch: int, tokens: int, rows: int, cu_seqlens: Tensor | None) -> Items:
    if cu_seqlens is None:
        per_row = ceil_div(tokens, rows)
        return Items(batch * per_row, rows, per_row)
    bounds = cu_seqlens.to(torch.int32)
    starts, ends, first = segment_bounds(bounds, rows, tokens // rows + bounds.numel() - 1)
    return Items(starts.numel(), min(rows, tokens), 1, starts, ends, first)


def _keeps_rest(v: Tensor, c0: float) -> bool:
    """Whether the backward needs o better than its dtype: without a constant in the scores, denominators may be near 0, and
    gradients divide the difference of values and o by them."""
    return c0 == 0 and v.dtype != torch.float32


def _then(inputs, outputs):
    *tensors, c0, c1, c2, eps = inputs
    backward(*tensors, *outputs, outputs[0], c0, c1, c2, eps)


@compiled_together(_then)
def forward(q, k, v, cu_seqlens, c0, c1, c2, eps) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V], what rounding took from it (or nothing), and the denominators with eps [B, T, H] fp32."""
    call = Call.make(q, k, v, cu_seqlens)
    new = torch.empty if cu_seqlens is None else torch.zeros  # tokens outside every document
    o = new(v.shape, dtype=v.dtype, device=v.device)
    denominator = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    rest = torch.empty_like(o) if _keeps_rest(v, c0) else v.new_empty(0)
    state = call.states(call.k, call.v) if call.has_state else denominator
    tile = call.tile("forward")
    block_forward[call.grid(tile)](
        o_ptr=o,
        rest_ptr=rest,
        REST=_keeps_rest(v, c0),
        denominator_ptr=denominator,
        state_ptr=state,
        **call.tensors,
        eps=eps,
        c0=c0,
        c1=c1,
        c2=c2,
        HAS_STATE=call.has_state,
        **call.settings,
        **tile,
    )
    return o, rest, denominator


def _fake_forward(q, k, v, cu_seqlens, c0, c1, c2, eps):
    rest = v.new_empty(v.shape if _keeps_rest(v, c0) else 0)
    return v.new_empty(v.shape), rest, v.new_empty(v.shape[:3], dtype=torch.float32)


def backward(q, k, v, cu_seqlens, o, rest, denominator, do, c0, c1, c2, eps) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.make(q, k, v, cu_seqlens)
    do, delta = do.to(v.dtype).contiguous(), torch.empty_like(denominator)
    V, rows = call.layout.V, delta.numel()
    row_products[(ceil_div(rows, 32),)](
        o, rest, do, delta, rows, V=V, BV=power_of_2(V), BR=32, REST=rest.numel() > 0, num_warps=4
    )
    new = torch.empty if cu_seqlens is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    gradient = {"do_ptr": do, "denominator_ptr": denominator, "delta_ptr": delta}
    shared = {**gradient, **call.tensors, "c1": c1, "c2": c2, "HAS_STATE": call.has_state, **call.settings}
    tile = call.tile("dq")
    state = call.states(call.k, call.v) if call.has_state else delta
    block_dq[call.grid(tile)](dq_ptr=dq, state_ptr=state, **shared, **tile)
    del state
    tile = call.tile("dkv")
    state = call.states(call.q, do, (denominator, delta)) if call.has_state else delta
    block_dkv[call.grid(tile)](dk_ptr=dk, dv_ptr=dv, state_ptr=state, c0=c0, **shared, **tile)
    return dq, dk, dv


def _fake_backward(q, k, v, cu_seqlens, o, rest, denominator, do, c0, c1, c2, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Polynomial(torch.autograd.Function):
    """Autograd around the two operators. A plain Function costs the host a third of what a custom_op's layers do."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, *score):
        o, rest, denominator = torch.ops.flame.polynomial_forward(q, k, v, cu_seqlens, *score)
        ctx.save_for_backward(q, k, v, cu_seqlens, o, rest, denominator)
        ctx.score = score
        return o

    @staticmethod
    def backward(ctx, do):
        return *torch.ops.flame.polynomial_backward(*ctx.saved_tensors, do, *ctx.score), *[None] * 5


def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Write and read of a state of d (d + 3) / 2 + 1 features."""
    d = q_shape[-1]
    return 4 * q_shape[0] * q_shape[1] * q_shape[2] * (d * (d + 3) // 2 + 1) * v_shape[-1]


def _backward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(q_shape, k_shape, v_shape)


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _run, _fake in (
    ("polynomial_forward", forward, _fake_forward),
    ("polynomial_backward", backward, _fake_backward),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
register_flop_formula(torch.ops.flame.polynomial_forward)(_forward_flops)
register_flop_formula(torch.ops.flame.polynomial_backward)(_backward_flops)
