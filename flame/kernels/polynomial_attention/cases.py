"""Cases by which `flame doctor` proves polynomial attention on a machine."""

from __future__ import annotations

import torch

from flame.kernels import tiles
from flame.kernels.checking import RAGGED, Case, Tensors
from flame.kernels.polynomial_attention import polynomial_attention

COEFFICIENTS = {"based": (1.0, 1.0, 0.5), "rebased": (0.0, 0.0, 1.0)}


def cases() -> list[Case]:
    fp16, fp32 = torch.float16, torch.float32
    lengths = (1, 63, 64, 65, 300, 1300, 4103)
    # A single token's gradients are a scalar a head times a vector: many heads, so that no one rounding is all there is.
    checked = [
        make_case(kind, (0, tokens), heads=16 if tokens == 1 else 2) for kind in COEFFICIENTS for tokens in lengths
    ]
    checked += [make_case(kind, RAGGED) for kind in COEFFICIENTS]
    for kind in COEFFICIENTS:
        checked += [make_case(kind, (0, 700), dtype=dtype) for dtype in (fp16, fp32)]
        checked += [make_case(kind, (0, 700), d=d, V=V) for d, V in ((16, 128), (12, 96), (32, 64))]
    return checked + [make_case("based", (0, 4096), batch=8, heads=16, tune=True)]


def make_case(
    kind: str,
    bounds: tuple[int, ...],
    *,
    batch: int = 1,
    heads: int = 2,
    d: int = 16,
    V: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    tune: bool = False,
) -> Case:
    packed = len(bounds) > 2

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator(device).manual_seed(seed)
        widths = {"q": d, "k": d, "v": V}
        shape = (batch, bounds[-1], heads)
        call = {n: torch.randn(*shape, w, generator=g, device=device).to(dtype) for n, w in widths.items()}
        if packed:
            call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return call

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        # ReBased's first rows divide by one squared score, which may be 0; a larger eps keeps the case well conditioned.
        # Based's first token has o = v A / (A + eps), and its gradient is what eps leaves of the difference v - o, which
        # o in 16 bits does not hold unless eps is as large as A. (ReBased keeps what rounding takes from o.)
        coefficients, eps = COEFFICIENTS[kind], 10.0 if kind == "based" and bounds[-1] == 1 else 0.1
        o, _ = polynomial_attention(**tensors, coefficients=coefficients, eps=eps, backend=backend)
        return {"o": o}

    facts = {"K": d, "V": V, "dtype": dtype}
    name = f"{kind} B={batch} T={bounds[-1]} H={heads} d={d} V={V} {str(dtype).removeprefix('torch.')}"
    return Case(
        op="polynomial_attention",
        name=name + " packed" * packed,
        inputs=inputs,
        run=run,
        keys={tiles.key(kernel, **facts): choices for kernel, choices in CHOICES.items()},
        tune=tune,
    )


def _tiles(*rows: tuple[int, int, int, int]) -> list[tiles.Tile]:
    return [{"BT": bt, "BS": bs, "num_warps": warps, "num_stages": stages} for bt, bs, warps, stages in rows]


CHOICES: dict[str, list[tiles.Tile]] = {
    "block": [{"ROWS": rows} for rows in (256, 512, 1024)],
    "forward": _tiles((64, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)),
    "dq": _tiles((64, 64, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)),
    "dkv": _tiles((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)),
}
