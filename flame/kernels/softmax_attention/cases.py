"""Cases by which `flame doctor` proves softmax attention on a machine, and tunes the tiled kernels behind its sinks, FoX and
PaTH."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels import tiles
from flame.kernels.checking import Case, Tensors
from flame.kernels.forgetting_attention import forgetting_attention
from flame.kernels.softmax_attention import softmax_attention

BOUNDS = (0, 1, 3, 3, 200, 700, 1000)


@dataclass(frozen=True)
class Shape:
    """heads: of q, k and v. gated: the gates of FoX, near 1 so that distant keys count."""

    heads: tuple[int, int, int]
    D: int
    Dv: int
    queries: int = 1000
    keys: int = 1000
    batch: int = 2
    window: int | None = None
    packed: bool = False
    sink: bool = False
    gated: bool = False


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
        Shape((4, 2, 2), 128, 128, sink=True),
        Shape((4, 4, 4), 64, 64, sink=True, window=100),
        Shape((4, 1, 1), 128, 128, sink=True, packed=True),
        Shape((4, 4, 4), 128, 128, gated=True),
        Shape((4, 4, 4), 64, 64, gated=True),
        *(Shape((4, 2, 2), 64, 64, tokens, tokens, sink=True) for tokens in (1, 63, 65, 4103)),
    ]
    tuned = [
        Shape((16, 16, 16), D, D, 8192, 8192, sink=not gated, gated=gated) for D in (64, 128) for gated in (True, False)
    ]
    return [make_case(shape) for shape in shapes] + [make_case(shape, tune=True) for shape in tuned]


def make_case(shape: Shape, tune: bool = False) -> Case:
    s = shape
    batch = 1 if s.packed else s.batch

    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        lengths, widths = (s.queries, s.keys, s.keys), (s.D, s.D, s.Dv)
        tensors = {name: normal(batch, T, H, D).bfloat16() for name, T, H, D in zip("qkv", lengths, s.heads, widths)}
        if s.packed:
            tensors["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        if s.sink:
            tensors["sink"] = normal(s.heads[0])
        if s.gated:
            tensors["log_forget"] = F.logsigmoid(normal(batch, s.keys, s.heads[0]) + 4)
        return tensors

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        if s.gated:
            return {"o": forgetting_attention(**tensors, backend=backend)}
        return {"o": softmax_attention(**tensors, window=s.window, backend=backend)}

    heads, flags = "/".join(map(str, s.heads)), [f"window={s.window}"] if s.window else []
    flags += [flag for flag in ("packed", "sink", "gated") if getattr(s, flag)]
    name = " ".join([f"B={batch} Tq={s.queries} H={heads} D={s.D} Dv={s.Dv} bfloat16", *flags])
    keys = tile_keys(s) if s.sink or s.gated else {}
    return Case("softmax_attention", name, inputs, run, tolerance=1e-2, keys=keys, tune=tune)


def tile_keys(s: Shape) -> dict[str, list[tiles.Tile]]:
    """Keys of the kernels as `triton_flash.pick_tile` asks for them, and tiles worth timing."""
    facts = {"K": s.D, "V": s.Dv, "dtype": torch.bfloat16, "gated": int(s.gated)}
    wide = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)]
    rows = {"forward": wide, "dq": [*wide, (128, 64, 8, 1), (64, 32, 4, 3), (128, 32, 8, 2)]}
    rows["dkv"] = [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 4, 2)]
    names = ("BM", "BN", "num_warps", "num_stages")
    return {tiles.key(kernel, **facts): [dict(zip(names, row)) for row in found] for kernel, found in rows.items()}
