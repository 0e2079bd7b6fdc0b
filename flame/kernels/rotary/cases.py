"""Cases by which `flame doctor` proves the rotary embedding on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.rotary import rotary


def cases() -> list[Case]:
    shapes = [(2, 301, 5, 64, torch.bfloat16), (2, 301, 2, 128, torch.bfloat16), (1, 77, 3, 48, torch.float32)]
    return [make_case(*shape) for shape in shapes]


def make_case(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        # Angles of fp32 positions: at 1000 they are right to 1e-4, far out the definition itself is fp32.
        positions = torch.randint(0, 1000, (B, T), generator=generator, device=device)
        x = torch.randn(B, T, H, 2 * D, generator=generator, device=device).to(dtype)
        return {"x": x, "positions": positions}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"y": rotary(tensors["x"][..., :D], tensors["positions"], backend=backend)}

    return Case("rotary", f"B={B} T={T} H={H} D={D} {str(dtype).removeprefix('torch.')}", inputs, run)
