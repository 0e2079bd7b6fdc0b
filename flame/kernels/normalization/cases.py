"""Cases by which `flame doctor` proves and tunes the norms on a machine."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.checking import Case, Tensors
from flame.kernels.normalization import gated_rms_norm, group_norm, l2_norm, layer_norm, rms_norm

WIDTHS = (64, 100, 128, 256, 512, 1024, 2048, 2304, 4096, 6144, 16384)


def cases() -> list[Case]:
    checked = [make_case(kind, (333, C), torch.bfloat16) for C in WIDTHS for kind in ("rms", "residual", "gated")]
    checked += [make_case(kind, (333, 2048), torch.bfloat16) for kind in ("layer", "group", "gated_first", "l2")]
    checked += [make_case(kind, (77, 128), torch.float32) for kind in KINDS]
    tuned = [make_case("rms", (32768, C), torch.bfloat16, tune=True) for C in (1024, 2048, 4096)]
    tuned += [make_case("gated", (32768, 16, C), torch.bfloat16, tune=True) for C in (64, 128, 256, 512)]
    return checked + tuned


def _residual(x: Tensor, w: Tensor, beside: Tensor, backend: str | None) -> Tensors:
    y, total = rms_norm(x, w, 1e-6, beside, backend=backend)
    return {"y": y, "total": total}


KINDS = {
    "rms": lambda x, w, beside, backend: {"y": rms_norm(x, w, backend=backend)},
    "residual": _residual,
    "layer": lambda x, w, beside, backend: {"y": layer_norm(x, w, w, backend=backend)},
    "group": lambda x, w, beside, backend: {"y": group_norm(x, 16, w, w, backend=backend)},
    "gated": lambda x, w, beside, backend: {"y": gated_rms_norm(x, beside, w, backend=backend)},
    "gated_first": lambda x, w, beside, backend: {
        "y": gated_rms_norm(x, beside, w, 1e-5, "sigmoid", True, 4, backend=backend)
    },
    "l2": lambda x, w, beside, backend: {"y": l2_norm(x, backend=backend)},
}
USES_BESIDE = ("residual", "gated", "gated_first")


def make_case(kind: str, shape: tuple[int, ...], dtype: torch.dtype, tune: bool = False) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {"x": shape}
        if kind != "l2":
            shapes["w"] = shape[-1:]
        if kind in USES_BESIDE:
            shapes["beside"] = shape
        return {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return KINDS[kind](tensors["x"], tensors.get("w"), tensors.get("beside"), backend)

    text = "x".join(map(str, shape))
    name = f"{kind} {text} {str(dtype).removeprefix('torch.')}"
    return Case("normalization", name, inputs, run, keys=_keys(kind, shape[-1]), tune=tune)


def _keys(kind: str, C: int) -> dict[str, list[dict[str, int]]]:
    from flame.kernels.normalization.triton_norm import tile_key

    if kind not in ("rms", "gated"):
        return {}
    gated = kind == "gated"
    forward = [{"elements": e, "num_warps": w} for e in (1024, 2048, 4096) for w in (2, 4, 8)]
    backward = [
        {"elements": e, "num_warps": w, "programs": p}
        for e in (1024, 2048, 8192)
        for w in (4, 8)
        for p in (2, 4, 8, 16)
    ]
    return {tile_key("forward", C, gated): forward, tile_key("backward", C, gated): backward}
