"""Cases by which `flame doctor` proves the log-normaliser gate on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors, scan_shapes
from flame.kernels.log_gate import log_gate

HEADS = 2


def cases() -> list[Case]:
    return [make_case(*shape) for shape in scan_shapes(widths=(64, 100, 1024))]


def make_case(batch: int, bounds: tuple[int, ...], width: int, dtype: torch.dtype, strong: bool) -> Case:
    """`width` is the slots of a head; strong logits make gates that close at once."""

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, bounds[-1], HEADS, width, generator=g) * (8.0 if strong else 1.0)
        sequences = batch if len(bounds) == 2 else len(bounds) - 1
        state = torch.randn(sequences, HEADS, width, generator=g).to(device)
        call = {"x": x.to(device, dtype), "initial_state": state}
        if len(bounds) > 2:
            call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return call

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        backend = "chunked" if backend == "reference" and bounds[-1] > 64 else backend
        weight, log_decay, final = log_gate(**tensors, output_final_state=True, backend=backend)
        results = {"weight": weight, "log_decay": log_decay}
        return results if final is None else results | {"final": final}

    flags = (" packed" if len(bounds) > 2 else "") + (" strong" if strong else "")
    name = f"B={batch} T={bounds[-1]} H={HEADS} M={width} {str(dtype).removeprefix('torch.')}{flags}"
    return Case("log_gate", name, inputs, run)
