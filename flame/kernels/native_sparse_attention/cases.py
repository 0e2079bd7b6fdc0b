"""Cases by which `flame doctor` proves native sparse attention on a machine.

Two right implementations may choose different blocks where scores nearly tie. So outputs and gradients are compared on
given blocks, and the choice by the weight that the chosen blocks have, which near ties leave as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.backend import select_backend
from flame.kernels.block_attention import cases as block_cases
from flame.kernels.block_attention.chunked import block_means
from flame.kernels.checking import Case, Tensors
from flame.kernels.native_sparse_attention import SparsePattern, chunked, native_sparse_attention
from flame.kernels.tiles import Tile


@dataclass(frozen=True)
class Shape:
    heads: tuple[int, int]
    D: int
    pattern: SparsePattern
    tokens: int = 1000
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16
    tune: bool = False


def cases() -> list[Case]:
    few = SparsePattern(64, 4, 100)
    shapes = [
        *(Shape((32, 2), D, few) for D in (32, 64, 128)),
        Shape((32, 2), 128, few, packed=True),
        Shape((8, 2), 64, SparsePattern(32, 3, 0)),
        Shape((6, 2), 96, SparsePattern(16, 5, 64), packed=True),
        Shape((4, 4), 256, few),
        Shape((4, 2), 64, few, dtype=torch.float32),
        *(Shape((16, 1), 64, few, tokens=tokens) for tokens in (3, 63, 65, 2053)),
        Shape((64, 4), 128, SparsePattern(), tokens=16384, tune=True),
        Shape((32, 2), 64, SparsePattern(), tokens=16384, tune=True),
    ]
    choices = [Shape((32, 2), 128, few, tokens=2000), Shape((4, 4), 64, SparsePattern(16, 7, 0), tokens=1500)]
    return [make_case(shape) for shape in shapes] + [make_choice(shape) for shape in choices]


def title(shape: Shape) -> str:
    p = shape.pattern
    return (
        f"B={block_cases.batch(_as_blocks(shape))} T={shape.tokens} H={shape.heads[0]}/{shape.heads[1]} D={shape.D} "
        f"block={p.block_size} S={p.block_count} window={p.window} {str(shape.dtype).removeprefix('torch.')}"
        f"{' packed' if shape.packed else ''}"
    )


def make_case(shape: Shape) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        tensors = block_cases.inputs(_as_blocks(shape), device, seed)
        gates = torch.rand(
            *tensors["q"].shape[:3], 3, generator=torch.Generator(device).manual_seed(seed), device=device
        )
        return {**tensors, "gates": gates.to(shape.dtype)}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        rest = {name: x for name, x in tensors.items() if name != "indices"}
        o = native_sparse_attention(**rest, pattern=shape.pattern, block_indices=tensors["indices"], backend=backend)
        return {"o": o}

    # The window branch is softmax_attention's, and so is its tolerance.
    tolerance = 1e-2 if shape.pattern.window and shape.dtype != torch.float32 else None
    return Case("native_sparse_attention", title(shape), inputs, run, tolerance, keys=keys(shape), tune=shape.tune)


def make_choice(shape: Shape) -> Case:
    """The compressed weight of the blocks chosen, exactly computed; near ties change the choice but not its weight."""

    def inputs(device: torch.device, seed: int) -> Tensors:
        tensors = block_cases.inputs(_as_blocks(shape), device, seed)
        return {name: tensors[name] for name in ("q", "k", "v")}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"weight": chosen_weight(tensors, shape.pattern, backend)}

    return Case("native_sparse_attention", f"choice {title(shape)}", inputs, run, constant=("q", "k", "v"))


def chosen_weight(tensors: Tensors, pattern: SparsePattern, backend: str | None) -> Tensor:
    """`[B, T, Hk]` fp64: what the chosen blocks before the own one weigh in the compressed branch."""
    q, k, v = (tensors[name].double() for name in "qkv")
    scale, T, Hk = q.shape[-1] ** -0.5, q.shape[1], k.shape[2]
    means = block_means(k, pattern.block_size), block_means(v, pattern.block_size)
    _, weights = chunked.compressed_band(q, *means, 0, pattern.block_size, scale)
    if select_backend(tensors["q"], backend) == "triton":
        from flame.kernels.block_attention.triton_layout import make_blocks
        from flame.kernels.block_attention.triton_select import packed_means
        from flame.kernels.native_sparse_attention import triton_op

        blocks = make_blocks(q, pattern.block_size, None)
        k_means, v_means = packed_means(tensors["k"], blocks), packed_means(tensors["v"], blocks)
        call = triton_op.Call(pattern.block_size, pattern.block_count, scale, None)
        _, lse = triton_op.compress(tensors["q"], k_means, v_means, None, call)
        indices = triton_op.choose(tensors["q"], k_means, lse, None, call)
    else:
        indices = chunked.choose(weights, 0, pattern, Hk)
    importance = torch.nn.functional.pad(weights.sum(3), (0, 2))  # the own block may be incomplete; and a spare column
    spare = importance.shape[-1] - 1
    own = (torch.arange(T, device=q.device) // pattern.block_size)[:, None, None]
    picked = torch.where((indices < 0) | (indices >= own), spare, indices).long()
    return importance.gather(-1, picked).sum(-1)


def _as_blocks(shape: Shape) -> block_cases.Shape:
    H, Hk = shape.heads
    p = shape.pattern
    return block_cases.Shape(
        (H, Hk, Hk), shape.D, shape.D, p.block_size, p.block_count, shape.tokens, shape.packed, shape.dtype, shape.tune
    )


def keys(shape: Shape) -> dict[str, list[Tile]]:
    facts = f"D={shape.D} E={shape.D} rows={shape.heads[0] // shape.heads[1]} dtype="
    facts += str(shape.dtype).removeprefix("torch.")
    tiles: list[Tile] = [
        {"BM": BM, "BC": BC, "num_warps": w, "num_stages": s}
        for BM in (64, 128)
        for BC in (32, 64)
        for w in (4, 8)
        for s in (2, 3)
    ]
    return {f"{name} {facts}": tiles for name in ("compressed", "compressed_queries", "compressed_means")}
