"""Cases by which `flame doctor` proves the elementwise scan on a machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flame.kernels.checking import Case, Tensors, scan_shapes
from flame.kernels.elementwise_scan import elementwise_scan


def cases() -> list[Case]:
    return [make_case(*shape) for shape in scan_shapes(widths=(64, 200, 2048))]


def make_case(batch: int, bounds: tuple[int, ...], width: int, dtype: torch.dtype, strong: bool) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        tokens = bounds[-1]
        x, gate = (torch.randn(batch, tokens, width, generator=g).to(device) for _ in range(2))
        call = {"x": x.to(dtype), "log_decay": (F.logsigmoid(gate) * (8.0 if strong else 1.0)).to(dtype)}
        sequences = batch if len(bounds) == 2 else len(bounds) - 1
        call["initial_state"] = torch.randn(sequences, width, generator=g).to(device)
        if len(bounds) > 2:
            call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return call

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        # The recurrence takes a step a token; in fp64 the chunked form equals it (tests prove it).
        backend = "chunked" if backend == "reference" and bounds[-1] > 64 else backend
        h, final = elementwise_scan(**tensors, output_final_state=True, backend=backend)
        return {"h": h} if final is None else {"h": h, "final": final}

    flags = (" packed" if len(bounds) > 2 else "") + (" strong" if strong else "")
    name = f"B={batch} T={bounds[-1]} E={width} {str(dtype).removeprefix('torch.')}{flags}"
    return Case("elementwise_scan", name, inputs, run)
