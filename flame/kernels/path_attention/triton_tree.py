"""The tree of blocks in a few kernels: how PaTH runs on a GPU for heads up to 128.

Blocks of 64 tokens (`triton_base`) join by 8 until at most 16 units are left; at every level the queries of a unit see the
units before theirs in the group (`triton_walk`) through small matrices (`triton_chain`). Of the forward only the output and
every query's normalizer are kept. The lowest join holds one matrix for each pair of its blocks, so it takes a few heads at a
time; levels above take all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.layout import cdiv
from flame.kernels.path_attention import triton_base as base
from flame.kernels.path_attention import triton_chain as chains
from flame.kernels.path_attention import triton_walk as walks
from flame.kernels.path_attention.levels import BLOCK, Level, kept_shapes, levels_of, padded_tokens, padded_width
from flame.kernels.path_attention.parts import LOG2E
from flame.kernels.path_attention.problem import Problem
from flame.kernels.path_attention.tree import APART
from flame.kernels.softmax_attention.triton_gates import running_sums

SHARE = 1 << 29  # elements of pairs' matrices K x K times 64 that the lowest level holds at a time
# BM, BN, warps, stages of the walks by head size.
TILES = {
    ("forward", 64): (128, 64, 4, 3),
    ("forward", 128): (128, 64, 8, 2),
    ("dq", 64): (64, 64, 4, 3),
    ("dq", 128): (64, 64, 8, 2),
    ("dkv", 64): (64, 64, 4, 2),
    ("dkv", 128): (64, 64, 8, 2),
}
EXACT = (32, 32, 4, 1)
INVERSE_WARPS = 1
ROUNDING = "bf16"  # of the gradients inside blocks
GRADIENT_WARPS = 4


@dataclass(frozen=True)
class Call:
    """Some heads of a problem as views, and what the kernels ask for. gates `[2, B * H, tokens]` fp32, base 2, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    gates: Tensor | None
    tokens: int
    scale: float

    @property
    def rows(self) -> int:
        return self.q.shape[0] * self.q.shape[2]

    @property
    def key_rows(self) -> int:
        return self.k.shape[0] * self.k.shape[2]

    @property
    def BK(self) -> int:
        return padded_width(self.q.shape[3])

    @property
    def BV(self) -> int:
        return padded_width(self.v.shape[3])

    @property
    def exact(self) -> bool:
        return self.q.dtype == torch.float32

    @property
    def gate_arguments(self) -> tuple[Tensor, int]:
        return (self.q, 0) if self.gates is None else (self.gates, self.gates.stride(0))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype or self.q.dtype)

    def some(self, share: Share) -> Call:
        if share.whole:
            return self
        gates = None if self.gates is None else self.gates[:, share.rows]
        k, v, w, beta = (x[share.batch, :, share.of_k] for x in (self.k, self.v, self.w, self.beta))
        return Call(self.q[share.batch, :, share.of_q], k, v, w, beta, gates, self.tokens, self.scale)


@dataclass(frozen=True)
class Share:
    """Neighbouring rows of workspaces: whole batch rows, or some heads of one."""

    batch: slice
    of_q: slice
    of_k: slice
    rows: slice
    key_rows: slice
    whole: bool


def shares(c: Call) -> Iterator[Share]:
    """All rows, as many at a time as the lowest level may hold."""
    (B, _, H, _), Hk = c.q.shape, c.k.shape[2]
    each, most = H // Hk, SHARE // (c.tokens * c.BK**2)  # rows of queries
    if most >= H:
        heads, batches = Hk, max(1, min(B, most // H))
    else:
        heads, batches = max(1, most // each), 1
    for b in range(0, B, batches):
        for h in range(0, Hk, heads):
            end, last = min(b + batches, B), min(h + heads, Hk)
            keys = slice(b * Hk + h, (end - 1) * Hk + last)
            of_q, rows = slice(h * each, last * each), slice(keys.start * each, keys.stop * each)
            yield Share(slice(b, end), of_q, slice(h, last), rows, keys, batches >= B and heads >= Hk)


def make_call(p: Problem) -> Call:
    tokens = padded_tokens(p.q.shape[1])
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in (p.q, p.k, p.v, p.w.float()))
    return Call(*dense, p.beta.float(), _gates(p, tokens), tokens, p.scale)


def _gates(p: Problem, tokens: int) -> Tensor | None:
    """`[2, B * H, tokens]`: running sums, the last one on. Documents begin with a gate that lets nothing through."""
    if p.log_forget is None and p.cu_seqlens is None:
        return None
    B, T, H, _ = p.q.shape
    steps = p.w.new_zeros(B, T, H, dtype=torch.float32) if p.log_forget is None else p.log_forget.float()
    if p.cu_seqlens is not None:
        starts = steps.new_zeros(T + 1).index_fill(0, p.cu_seqlens.long(), -APART / p.scale)[:T]
        steps = steps + starts[:, None]
    return running_sums(steps, LOG2E * p.scale, tokens).flatten(1, 2)


@dataclass
class Rows:
    """q `[rows, tokens, BK]` and k `[key rows, tokens, BK]` at the bounds of units; e `[key rows, units, BK, BK]` fp32."""

    q: Tensor
    k: Tensor
    e: Tensor

    def some(self, share: Share) -> Rows:
        return Rows(self.q[share.rows], self.k[share.key_rows], self.e[share.key_rows])


def strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in (0, 1, 2)]


def precision(c: Call, careful: bool = False) -> str:
    return "ieee" if c.exact else "tf32x3" if careful else "tf32"


@dataclass
class Blocks:
    """Of each block the inverse and reach `[key rows, blocks, BLOCK, BLOCK]`, y `[key rows, tokens, BK]`, fp32."""

    inverse: Tensor
    reach: Tensor
    y: Tensor


def make_blocks(c: Call, o: Tensor | None, lse: Tensor | None, keep: bool = False) -> tuple[Rows, Blocks]:
    """The lowest level, and with `keep` what the gradient needs; with o `[rows, tokens, BV]` and lse, what queries see inside
    their blocks."""
    blocks, (H, Hk), T = c.tokens // BLOCK, (c.q.shape[2], c.k.shape[2]), c.q.shape[1]
    sizes = {"K": c.q.shape[3], "BK": c.BK}
    inverse = c.new(c.key_rows, blocks, BLOCK, BLOCK, dtype=torch.float32)
    base.block_inverse[(c.key_rows * blocks,)](
        c.w,
        c.beta,
        inverse,
        *strides(c.w, c.beta),
        T,
        blocks,
        Hk,
        **sizes,
        PRECISION=precision(c, True),
        num_warps=INVERSE_WARPS,
    )
    rows = Rows(
        c.new(c.rows, c.tokens, c.BK), c.new(c.key_rows, c.tokens, c.BK),
        c.new(c.key_rows, blocks, c.BK, c.BK, dtype=torch.float32),
    )  # fmt: skip
    reach = torch.empty_like(inverse) if keep else inverse
    y = c.new(c.key_rows, c.tokens, c.BK, dtype=torch.float32) if keep else inverse
    base.block_keys[(c.key_rows * blocks,)](
        c.k, c.w, c.beta, inverse, rows.k, rows.e, y, reach, *strides(c.k, c.w, c.beta), T, blocks, Hk, **sizes,
        KEEP=keep, PRECISION=precision(c), num_warps=8,
    )  # fmt: skip
    gates, gates_size = c.gate_arguments
    base.block_queries[(c.rows * blocks,)](
        c.q, c.k, c.v, c.w, c.beta, inverse, gates, rows.q, o, lse, *strides(c.q, c.k, c.v, c.w, c.beta),
        T, blocks, H, Hk, gates_size, c.scale * LOG2E, **sizes, V=c.v.shape[3], BV=c.BV, GATED=c.gates is not None,
        ATTEND=o is not None, PRECISION=precision(c), num_warps=8,
    )  # fmt: skip
    return rows, Blocks(inverse, reach, y)


def join(c: Call, level: Level, at: Rows, joined: Tensor | None = None) -> Tensor:
    """The level's table `[key rows, groups, entries, BK, BK]` and, unless it is the last, E of its groups into `joined`."""
    table, BR = c.new(c.key_rows, level.groups, level.entries, c.BK, c.BK), min(c.BK, 64)
    chains.chain[c.key_rows * level.groups, level.fan + (not level.top), c.BK // BR](
        at.e, table, at.e if joined is None else joined, level.count, level.fan, level.groups, level.entries, BK=c.BK,
        BR=BR, JOIN=joined is not None, PRECISION=precision(c), num_warps=8 if c.BK > 64 else 4, num_stages=1,
    )  # fmt: skip
    return table


def carry(c: Call, level: Level, at: Rows, table: Tensor, moved: Rows) -> None:
    """Queries and keys at the bounds of the level's groups, into `moved`."""
    for x, out, keys in ((at.q, moved.q, False), (at.k, moved.k, True)):
        chains.carry[(x.shape[0] * (c.tokens // BLOCK),)](
            x, out, table, c.tokens, level.fan, level.groups, level.entries, c.q.shape[2], c.k.shape[2],
            BK=c.BK, UNIT=level.unit, KEYS=keys, BM=BLOCK, PRECISION=precision(c), num_warps=4,
        )  # fmt: skip


def pick_tile(c: Call, kernel: str) -> dict[str, int]:
    width = 64 if max(c.BK, c.BV) <= 64 else 128
    default = dict(zip(("BM", "BN", "num_warps", "num_stages"), EXACT if c.exact else TILES[kernel, width]))
    name = tiles.key(kernel, K=c.q.shape[3], V=c.v.shape[3], dtype=c.q.dtype, gated=int(c.gates is not None))
    return dict(tiles.choose("path_attention", name, default, c.q.device))


def fitted(c: Call, kernel: str, level: Level) -> dict[str, int]:
    """The tile of one walk, no larger than a unit."""
    tile = pick_tile(c, kernel)
    return {**tile, "BM": min(tile["BM"], level.unit), "BN": min(tile["BN"], level.unit)}


def attend(c: Call, level: Level, at: Rows, table: Tensor, o: Tensor, lse: Tensor) -> None:
    tile, (gates, gates_size) = fitted(c, "forward", level), c.gate_arguments
    walks.walk_forward[(c.rows * (c.tokens // tile["BM"]),)](
        at.q, at.k, c.v, table, o, lse, gates, *strides(c.v), c.q.shape[1], c.tokens, level.fan, level.groups,
        level.entries, c.q.shape[2], c.k.shape[2], gates_size, c.scale * LOG2E, V=c.v.shape[3], BK=c.BK, BV=c.BV,
        UNIT=level.unit, GATED=c.gates is not None, PRECISION=precision(c), **tile,
    )  # fmt: skip


def forward(p: Problem) -> tuple[Tensor, Tensor, Rows]:
    """o `[B, T, H, V]`; base 2 and padded, the log of every query's softmax sum `[B, H, tokens]` fp32; the rows of the
    second level (`levels.kept_shapes`)."""
    c = make_call(p)
    (B, T, H, _), V = p.q.shape, p.v.shape[3]
    o, lse = c.new(B, T, H, V), c.new(B, H, c.tokens, dtype=torch.float32)
    first, *rest = levels_of(c.tokens)
    seen, norm = c.new(c.rows, c.tokens, c.BV, dtype=torch.float32), lse.flatten(0, 1)
    shapes = kept_shapes(c.q, c.k)
    kept = Rows(c.new(*shapes[0]), c.new(*shapes[1]), c.new(*shapes[2], dtype=torch.float32))
    for share in shares(c):
        some, part, part_norm = c.some(share), seen[share.rows], norm[share.rows]
        at, _ = make_blocks(some, part, part_norm)
        moved = kept.some(share) if rest else None
        table = join(some, first, at, None if moved is None else moved.e)
        attend(some, first, at, table, part, part_norm)
        if moved is not None:
            carry(some, first, at, table, moved)
        del at, table
    for level, at, table in _upper(c, rest, kept):
        attend(c, level, at, table, seen, norm)
    o.copy_(seen.unflatten(0, (B, H))[:, :, :T, :V].transpose(1, 2))
    return o, lse, kept


def _upper(c: Call, rest: list[Level], at: Rows) -> Iterator[tuple[Level, Rows, Tensor]]:
    """Each level above the lowest with its rows and table."""
    for level in rest:
        joined = None if level.top else c.new(c.key_rows, level.groups, c.BK, c.BK, dtype=torch.float32)
        table = join(c, level, at, joined)
        yield level, at, table
        if joined is not None:
            moved = Rows(torch.empty_like(at.q), torch.empty_like(at.k), joined)
            carry(c, level, at, table, moved)
            at = moved


@dataclass
class Gradients:
    """dq `[rows, tokens, BK]`, dk `[key rows, tokens, BK]` and de (fp32) of one level; of all levels dv
    `[key rows, tokens, BV]` and, with gates, total `[rows, tokens]` fp32, row less column sums of dS."""

    q: Tensor
    k: Tensor
    e: Tensor | None
    v: Tensor
    total: Tensor | None

    def some(self, share: Share) -> Gradients:
        e = None if self.e is None else self.e[share.key_rows]
        total = None if self.total is None else self.total[share.rows]
        return Gradients(self.q[share.rows], self.k[share.key_rows], e, self.v[share.key_rows], total)


@dataclass
class Output:
    """do as given and, `[rows, tokens]` fp32, the normalizer and the products of o and do."""

    do: Tensor
    lse: Tensor
    delta: Tensor

    def some(self, share: Share) -> Output:
        return Output(self.do[share.batch, :, share.of_q], self.lse[share.rows], self.delta[share.rows])


def differentiate(c: Call, level: Level, at: Rows, table: Tensor, out: Output, above: Gradients | None) -> Gradients:
    """Gradients of a level's rows and E, given those of the level that it joins to."""
    size, split = c.BK**2, level.unit // level.part
    kind = torch.bfloat16 if c.q.dtype == torch.bfloat16 and split == 1 and level.unit == BLOCK else torch.float32
    dm = c.new(c.rows * level.groups * split * level.entries * size, dtype=kind)
    numbers = (c.tokens, level.fan, level.groups, level.entries, c.q.shape[2], c.k.shape[2])
    flags = {"BK": c.BK, "UNIT": level.unit, "PRECISION": precision(c)}
    if level.top or above is None:
        got, dlast, djoined = _no_gradients(c), dm, dm
    else:
        assert above.e is not None
        dlast, djoined = c.new(c.key_rows * level.groups * split * level.fan * size, dtype=kind), above.e
        got = Gradients(above.q, above.k, None, above.v, above.total)
        for x, moved, to, keys in ((at.q, above.q, dm, False), (at.k, above.k, dlast, True)):
            chains.uncarry[(x.shape[0] * cdiv(c.tokens, level.part),)](
                x, moved, moved, table, to, *numbers, **flags, PART=level.part, KEYS=keys, BM=BLOCK, num_warps=4
            )
    _walk_back(c, level, at, table, out, got, dm, flags)
    numbers = (level.count, *numbers)
    if level.count > 1:
        chains.unchain[c.key_rows * level.groups, level.fan - level.top](
            at.e, table, dm, dlast, djoined, *numbers, PART=level.part, TOP=level.top, **flags,
            num_warps=8 if c.BK > 64 else 4,
        )  # fmt: skip
    got.e = torch.empty_like(at.e)
    chains.gather[(c.key_rows * level.count,)](
        dm, dlast, got.e, level.count, level.fan, level.groups, level.entries, c.q.shape[2], c.k.shape[2],
        BK=c.BK, SPLIT=split, TOP=level.top, num_warps=4,
    )  # fmt: skip
    return got


def _no_gradients(c: Call) -> Gradients:
    total = None if c.gates is None else c.new(c.rows, c.tokens, dtype=torch.float32).zero_()
    dq, dk = c.new(c.rows, c.tokens, c.BK).zero_(), c.new(c.key_rows, c.tokens, c.BK).zero_()
    return Gradients(dq, dk, None, c.new(c.key_rows, c.tokens, c.BV).zero_(), total)


def _walk_back(
    c: Call, level: Level, at: Rows, table: Tensor, out: Output, got: Gradients, dm: Tensor, flags: dict[str, Any]
) -> None:
    if level.fan < 2:
        return
    gates, gates_size = c.gate_arguments
    numbers = (
        *strides(c.v, out.do), c.q.shape[1], c.tokens, level.fan, level.groups, level.entries, c.q.shape[2],
        c.k.shape[2], gates_size, c.scale * LOG2E, c.scale,
    )  # fmt: skip
    flags = {**flags, "V": c.v.shape[3], "BV": c.BV, "GATED": c.gates is not None}
    total = out.lse if got.total is None else got.total
    rows = (at.q, at.k, c.v, table, out.do, out.lse, out.delta)
    walks.walk_dq[(c.rows * cdiv(c.tokens, level.part),)](
        *rows, got.q, dm, total, gates, *numbers, **flags, PART=level.part, **fitted(c, "dq", level)
    )
    tile = fitted(c, "dkv", level)
    walks.walk_dkv[(c.key_rows * (c.tokens // tile["BN"]),)](
        *rows, got.k, got.v, total, gates, *numbers, **flags, **tile
    )


def backward(p: Problem, o: Tensor, lse: Tensor, kept: Rows, do: Tensor) -> dict[str, Tensor]:
    """Gradients of q, k, v, w, beta (fp32) and, by the name `gates` and natural, of the running sums of gates `[B, H, T]`."""
    c = make_call(p)
    first, *rest = levels_of(c.tokens)
    found = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in vars(c).items() if name in NAMES}
    out = _output(c, o, lse, do if do.stride(-1) == 1 else do.contiguous())
    above = _above(c, rest, kept, out) if rest else None
    totals = None if above is None else above.total
    for share in shares(c):
        part = None if above is None else above.some(share)
        into = {name: x[share.batch, :, share.of_q if name == "q" else share.of_k] for name, x in found.items()}
        total = _below(c.some(share), first, out.some(share), part, into)
        totals = total if share.whole else totals
        if above is None and not share.whole and total is not None:
            totals = torch.zeros_like(out.lse) if totals is None else totals
            totals[share.rows] = total
    if totals is not None:
        found["gates"] = totals.unflatten(0, (p.q.shape[0], -1))[:, :, : p.q.shape[1]]
    return found


NAMES = ("q", "k", "v", "w", "beta")


def _output(c: Call, o: Tensor, lse: Tensor, do: Tensor) -> Output:
    delta = torch.empty_like(lse).flatten(0, 1)
    base.row_products[(c.rows * (c.tokens // BLOCK),)](
        o, do, delta, *strides(o, do), c.q.shape[1], c.tokens, c.q.shape[2], V=c.v.shape[3], BV=c.BV, BM=BLOCK
    )
    return Output(do, lse.flatten(0, 1), delta)


def _above(c: Call, rest: list[Level], kept: Rows, out: Output) -> Gradients:
    """Gradients of what the lowest level hands on."""
    stack, got = list(_upper(c, rest, kept)), None
    while stack:
        level, at, table = stack.pop()
        got = differentiate(c, level, at, table, out, got)
    assert got is not None
    return got


def _below(c: Call, first: Level, out: Output, above: Gradients | None, into: dict[str, Tensor]) -> Tensor | None:
    """Writes the gradients of q, k, v, w and beta; those of the gates' running sums `[rows, tokens]`."""
    at, blocks = make_blocks(c, None, None, keep=True)
    got = differentiate(c, first, at, join(c, first, at), out, above)
    del at
    dk, dw, dy = (c.new(c.rows, c.tokens, c.BK, dtype=torch.float32) for _ in range(3))
    (T, H), Hk, count = c.q.shape[1:3], c.k.shape[2], c.tokens // BLOCK
    dv, dreach = c.new(c.rows, c.tokens, c.BV), c.new(c.rows, count, BLOCK, BLOCK, dtype=torch.float32)
    gates, gates_size = c.gate_arguments
    rounding = "ieee" if c.exact else ROUNDING
    flags = {"K": c.q.shape[3], "V": c.v.shape[3], "BK": c.BK, "BV": c.BV, "PRECISION": rounding}
    flags |= {"num_warps": GRADIENT_WARPS, "num_stages": 1}
    base.pair_gradients[(c.rows * count,)](
        c.q, c.k, c.v, c.w, blocks.y, blocks.reach, gates, out.do, out.lse, out.delta, got.q, dk, dv, dw, dreach, dy,
        dk if got.total is None else got.total, into["q"], *strides(c.q, c.k, c.v, c.w, out.do, into["q"]), T, count, H, Hk,
        gates_size, c.scale * LOG2E, c.scale, GATED=c.gates is not None, **flags,
    )  # fmt: skip
    base.reflection_gradients[(c.key_rows * count,)](
        c.k, c.w, c.beta, blocks.inverse, blocks.y, blocks.reach, got.k, got.v, got.e, dk, dv, dw, dreach, dy,
        into["k"], into["v"], into["w"], into["beta"],
        *strides(c.k, c.w, c.beta, into["k"], into["v"], into["w"], into["beta"]), T, count, H, Hk, **flags,
    )  # fmt: skip
    return got.total
