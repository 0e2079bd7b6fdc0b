"""Cases by which `flame doctor` proves the selective scan on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors, scan_shapes
from flame.kernels.selective_scan import selective_scan

STATES = 16


def cases() -> list[Case]:
    return [make_case(*shape) for shape in scan_shapes(widths=(64, 100, 1024))]


def make_case(batch: int, bounds: tuple[int, ...], width: int, dtype: torch.dtype, strong: bool) -> Case:
    """Mamba's own inputs: 16 states, skip, gate and step bias; strong steps forget everything in a few tokens."""

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        tokens = bounds[-1]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(device)

        call = {name: normal(batch, tokens, width).to(dtype) for name in ("x", "dt", "z")}
        call |= {name: normal(batch, tokens, STATES).to(dtype) for name in ("B", "C")}
        call["A"] = -(torch.rand(width, STATES, generator=g).to(device) * 4 + 0.1)
        call["D"] = normal(width)
        call["dt_bias"] = normal(width) + (4.0 if strong else -4.0)
        call["initial_state"] = normal(batch if len(bounds) == 2 else len(bounds) - 1, width, STATES)
        if len(bounds) > 2:
            call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return call

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        backend = "chunked" if backend == "reference" and bounds[-1] > 64 else backend
        y, final = selective_scan(**tensors, output_final_state=True, backend=backend)
        return {"y": y} if final is None else {"y": y, "final": final}

    flags = (" packed" if len(bounds) > 2 else "") + (" strong" if strong else "")
    name = f"B={batch} T={bounds[-1]} E={width} S={STATES} {str(dtype).removeprefix('torch.')}{flags}"
    return Case("selective_scan", name, inputs, run)
