"""Cases by which `flame doctor` proves block attention, and the choice of blocks, on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.block_attention import block_attention
from flame.kernels.block_attention.selection import select_blocks
from flame.kernels.checking import Case, Tensors
from flame.kernels.tiles import Tile

BOUNDS = (0, 1, 3, 3, 200, 700, 1000)


@dataclass(frozen=True)
class Shape:
    """heads: of queries, choices and keys."""

    heads: tuple[int, int, int]
    D: int
    Dv: int
    block: int
    slots: int
    tokens: int = 1000
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16
    tune: bool = False


def cases() -> list[Case]:
    nsa, moba = (32, 2, 2), (4, 4, 4)
    shapes = [
        *(Shape(nsa, D, D, 64, 4) for D in (32, 64, 128)),
        *(Shape(moba, D, D, 256, 3) for D in (64, 128)),
        Shape(nsa, 128, 128, 64, 4, packed=True),
        Shape(moba, 64, 64, 256, 2, packed=True),
        Shape((8, 4, 2), 64, 64, 128, 3),
        Shape((6, 2, 2), 96, 80, 48, 4),
        Shape((16, 1, 1), 192, 128, 64, 4),
        Shape((4, 4, 2), 256, 256, 64, 3),
        Shape((4, 2, 2), 64, 64, 64, 4, dtype=torch.float32),
        *(Shape((16, 1, 1), 64, 64, 64, 4, tokens=tokens) for tokens in (3, 63, 65, 2053)),
        Shape((64, 4, 4), 128, 128, 64, 16, tokens=8192, tune=True),
        Shape((32, 2, 2), 64, 64, 64, 16, tokens=16384, tune=True),
        Shape((16, 16, 16), 64, 64, 256, 4, tokens=16384, tune=True),
        Shape((16, 16, 16), 128, 128, 256, 4, tokens=16384, tune=True),
    ]
    return [make_case(shape) for shape in shapes]


def make_case(shape: Shape) -> Case:
    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"o": block_attention(**tensors, block_size=shape.block, backend=backend)}

    heads = "/".join(map(str, shape.heads))
    name = (
        f"B={batch(shape)} T={shape.tokens} H={heads} D={shape.D} Dv={shape.Dv} block={shape.block} "
        f"S={shape.slots} {str(shape.dtype).removeprefix('torch.')}{' packed' if shape.packed else ''}"
    )
    return Case("block_attention", name, lambda *at: inputs(shape, *at), run, keys=keys(shape), tune=shape.tune)


def batch(shape: Shape) -> int:
    return 1 if shape.packed or shape.tune else 2


def inputs(shape: Shape, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, width: int) -> Tensor:
        x = torch.randn(batch(shape), shape.tokens, heads, width, generator=generator, device=device)
        return x.to(shape.dtype)

    H, Hs, Hk = shape.heads
    tensors = {"q": draw(H, shape.D), "k": draw(Hk, shape.D), "v": draw(Hk, shape.Dv)}
    place = torch.arange(shape.tokens, device=device)
    if shape.packed:
        tensors["cu_seqlens"] = bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        place = place - bounds[torch.searchsorted(bounds, place, right=True) - 1]
    blocks = -(-shape.tokens // shape.block)
    scores = torch.rand(batch(shape), shape.tokens, Hs, blocks, generator=generator, device=device)
    tensors["indices"] = select_blocks(scores, place // shape.block, shape.slots, neighbours=True)
    return tensors


def keys(shape: Shape) -> dict[str, list[Tile]]:
    """Tiles worth trying on a GPU, for the shapes that have a production shape of their own."""
    facts = f"D={shape.D} E={shape.Dv} rows={shape.heads[0] // shape.heads[1]} block={shape.block} dtype="
    facts += str(shape.dtype).removeprefix("torch.")
    fused = shape.block <= 64
    part = grid((64, 128), (64,) if fused else (64, 128), (4, 8), (1, 2, 3))
    found = {
        f"part {facts}": part,
        f"keys {facts}": grid((32, 64, 128), (64,) if fused else (64, 128), (4, 8), (1, 2, 3)),
    }
    return found if fused else {**found, f"queries {facts}": part}


def grid(
    rows: tuple[int, ...], columns: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]
) -> list[Tile]:
    return [
        {"BM": BM, "BN": BN, "num_warps": w, "num_stages": s}
        for BM in rows
        for BN in columns
        for w in warps
        for s in stages
    ]
