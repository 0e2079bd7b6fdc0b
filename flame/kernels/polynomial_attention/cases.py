"""Cases by which `flame doctor` proves polynomial attention on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import RAGGED, Case, Tensors
from flame.kernels.polynomial_attention import polynomial_attention

COEFFICIENTS = {"based": (1.0, 1.0, 0.5), "rebased": (0.0, 0.0, 1.0)}


def cases() -> list[Case]:
    lengths = (1, 63, 64, 65, 300)
    checked = [make_case(kind, (0, tokens), torch.bfloat16) for kind in COEFFICIENTS for tokens in lengths]
    checked += [make_case(kind, RAGGED, torch.bfloat16) for kind in COEFFICIENTS]
    return checked + [make_case(kind, (0, 200), torch.float32) for kind in COEFFICIENTS]


def make_case(kind: str, bounds: tuple[int, ...], dtype: torch.dtype) -> Case:
    packed = len(bounds) > 2

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        widths = {"q": 16, "k": 16, "v": 64}
        call = {n: torch.randn(1, bounds[-1], 2, w, generator=g).to(device, dtype) for n, w in widths.items()}
        if packed:
            call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return call

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        # ReBased's first rows divide by one squared score, which may be 0; a larger eps keeps the case well conditioned.
        coefficients, eps = COEFFICIENTS[kind], 0.1
        o, _ = polynomial_attention(**tensors, coefficients=coefficients, eps=eps, backend=backend)
        return {"o": o}

    flags = " packed" if packed else ""
    return Case(
        "polynomial_attention", f"{kind} T={bounds[-1]} {str(dtype).removeprefix('torch.')}{flags}", inputs, run
    )
