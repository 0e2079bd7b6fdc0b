"""Cases by which `flame doctor` proves SwiGLU on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.swiglu import swiglu


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [make_case(C, packed, dtype) for dtype in dtypes for C in (100, 5632) for packed in (False, True)]


def make_case(C: int, packed: bool, dtype: torch.dtype) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        both = torch.randn(2, 4, 32, C, generator=generator, device=device).to(dtype)
        return {"both": torch.cat(both.unbind(0), -1)} if packed else dict(zip(("gate", "up"), both.unbind(0)))

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        gate, up = tensors["both"].chunk(2, -1) if packed else (tensors["gate"], tensors["up"])
        return {"y": swiglu(gate, up, backend=backend)}

    name = f"C={C} {str(dtype).removeprefix('torch.')}{' halves of one projection' if packed else ''}"
    return Case("swiglu", name, inputs, run)
