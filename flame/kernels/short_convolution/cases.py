"""Cases by which `flame doctor` proves and tunes the short convolution on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.short_convolution import short_convolution

BOUNDS = (0, 1, 3, 3, 200, 1000, 1003)  # documents shorter than the filter, none at all, long


def cases() -> list[Case]:
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    checked = [
        make_case(W, packed, dtype) for packed in (False, True) for W in (2, 3, 4) for dtype in (bf16, fp32, fp16)
    ]
    tuned = [make_case(4, packed, bf16, tokens=32768, channels=2048, tune=True) for packed in (False, True)]
    return checked + tuned


def make_case(
    W: int, packed: bool, dtype: torch.dtype, tokens: int = BOUNDS[-1], channels: int = 600, tune: bool = False
) -> Case:
    batch = 1 if packed else 2
    bounds = tuple(b * (tokens // BOUNDS[-1]) for b in BOUNDS[:-1]) + (tokens,)

    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {"x": (batch, tokens, 2 * channels), "weight": (channels, W), "bias": (channels,)}
        shapes["state"] = (len(bounds) - 1 if packed else batch, channels, W)
        tensors = {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}
        if packed:
            tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return tensors

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        y, final = short_convolution(
            tensors["x"][..., :channels],  # part of a wider projection
            tensors["weight"],
            tensors["bias"],
            activation="silu",
            initial_state=tensors["state"],
            output_final_state=not tune,
            cu_seqlens=tensors.get("cu_seqlens"),
            backend="chunked" if backend == "reference" else backend,  # equal in fp64, and not token by token
        )
        return {"y": y} if final is None else {"y": y, "final": final}

    name = f"W={W} B={batch} T={tokens} C={channels} {str(dtype).removeprefix('torch.')}{' packed' if packed else ''}"
    return Case("short_convolution", name, inputs, run, keys=_keys(packed, dtype), tune=tune)


def _keys(packed: bool, dtype: torch.dtype) -> dict[str, list[dict[str, int]]]:
    from flame.kernels.short_convolution.triton_convolution import tile_key

    sizes = ((256, 2), (512, 4), (512, 2), (1024, 4))
    tiles = [{"SEGMENT": s, "BLOCK": b, "num_warps": w} for s in (16, 32, 64, 128, 256) for b, w in sizes]
    return {tile_key(kernel, packed, dtype): tiles for kernel in ("forward", "backward")}
