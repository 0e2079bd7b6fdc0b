"""Cases by which `flame doctor` proves the token shift on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.token_shift import token_mix, token_shift

BOUNDS = (0, 1, 3, 3, 200, 1000, 1003)


def cases() -> list[Case]:
    kinds = [(packed, dtype) for packed in (False, True) for dtype in (torch.bfloat16, torch.float32)]
    return [make_case(*kind) for kind in kinds] + [mix_case(mixes, *kind) for mixes in (1, 6) for kind in kinds]


def make_case(packed: bool, dtype: torch.dtype) -> Case:
    batch, C = (1 if packed else 2), 200

    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {"x": (batch, BOUNDS[-1], C), "state": (len(BOUNDS) - 1 if packed else batch, C)}
        tensors = {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}
        if packed:
            tensors["cu_seqlens"] = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
        return tensors

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        y, final = token_shift(**tensors, output_final_state=True, backend=backend)
        return {"y": y} if final is None else {"y": y, "final": final}

    return Case("token_shift", f"{str(dtype).removeprefix('torch.')}{' packed' if packed else ''}", inputs, run)


def mix_case(mixes: int, packed: bool, dtype: torch.dtype) -> Case:
    shift = make_case(packed, dtype)

    def inputs(device: torch.device, seed: int) -> Tensors:
        tensors = shift.inputs(device, seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        weight = torch.rand(mixes, tensors["x"].shape[-1], generator=generator, device=device)
        return {**tensors, "weight": weight.to(dtype)}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        ys, final = token_mix(**tensors, output_final_state=True, backend=backend)
        named = {f"y{i}": y for i, y in enumerate(ys)}
        return named if final is None else {**named, "final": final}

    return Case("token_shift", f"{mixes} mixes {shift.name}", inputs, run)
