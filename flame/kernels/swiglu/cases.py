"""Cases by which `flame doctor` proves SwiGLU on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.swiglu import swiglu, swiglu_linear


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    alone = [make_case(C, packed, dtype) for dtype in dtypes for C in (100, 5632) for packed in (False, True)]
    return alone + [make_linear_case(C, dtype) for dtype in dtypes[:2] for C in (96, 2816)]


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


def make_linear_case(C: int, dtype: torch.dtype) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        gate, up = torch.randn(2, 4, 64, C, generator=generator, device=device).to(dtype).unbind(0)
        weight = torch.randn(128, C, generator=generator, device=device).to(dtype) / 16
        return {"gate": gate, "up": up, "weight": weight}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"y": swiglu_linear(tensors["gate"], tensors["up"], tensors["weight"], backend=backend)}

    return Case("swiglu", f"C={C} {str(dtype).removeprefix('torch.')} with the product after it", inputs, run)
