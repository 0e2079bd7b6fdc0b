"""Cases by which `flame doctor` proves softmax attention on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.softmax_attention import softmax_attention

BOUNDS = (0, 1, 3, 3, 200, 700, 1000)


@dataclass(frozen=True)
class Shape:
    heads: tuple[int, int, int]
    D: int
    Dv: int
    queries: int = 1000
    window: int | None = None
    packed: bool = False


def cases() -> list[Case]:
    shapes = [
        Shape((4, 4, 4), 128, 128),
        Shape((4, 2, 2), 64, 64),
        Shape((4, 1, 4), 64, 64),
        Shape((4, 4, 4), 192, 128),
        Shape((4, 4, 4), 128, 128, window=100),
        Shape((4, 2, 2), 128, 128, queries=7),
        Shape((4, 2, 2), 128, 128, queries=1, window=100),
        Shape((4, 2, 2), 128, 128, packed=True),
        Shape((4, 4, 4), 64, 64, window=100, packed=True),
        Shape((4, 4, 4), 192, 128, packed=True),
    ]
    return [make_case(shape) for shape in shapes]


def make_case(shape: Shape) -> Case:
    batch = 1 if shape.packed else 2

    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        lengths, widths = (shape.queries, BOUNDS[-1], BOUNDS[-1]), (shape.D, shape.D, shape.Dv)
        tensors = {
            name: torch.randn(batch, T, H, D, generator=generator, device=device).bfloat16()
            for name, T, H, D in zip("qkv", lengths, shape.heads, widths)
        }
        if shape.packed:
            tensors["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        return tensors

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"o": softmax_attention(**tensors, window=shape.window, backend=backend)}

    heads = "/".join(map(str, shape.heads))
    flags = f"{f' window={shape.window}' if shape.window else ''}{' packed' if shape.packed else ''}"
    name = f"B={batch} Tq={shape.queries} H={heads} D={shape.D} Dv={shape.Dv} bfloat16{flags}"
    return Case("softmax_attention", name, inputs, run, tolerance=1e-2)
