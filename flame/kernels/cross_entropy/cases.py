"""Cases by which `flame doctor` proves and tunes the cross-entropies on a machine."""

from __future__ import annotations

import torch

from flame.kernels.checking import Case, Tensors
from flame.kernels.cross_entropy import cross_entropy, linear_cross_entropy, linear_kl_divergence

ALL_TERMS = {"z_loss": 1e-3, "label_smoothing": 0.1, "soft_cap": 5.0}
BF16_LOGITS = 8e-3  # gradients of logits that were themselves rounded to bf16


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    checked = [make_plain(V, bf16, {}) for V in (1000, 32000, 50257, 65536, 128256, 152064)]
    checked += [make_plain(32001, dtype, ALL_TERMS) for dtype in (bf16, fp32)]
    checked += [make_linear(700, 256, V, bf16, {}) for V in (1000, 32000, 50257, 128256)]
    checked += [make_linear(700, 256, 32001, bf16, ALL_TERMS), make_linear(130, 64, 1000, fp32, ALL_TERMS), make_kl()]
    tuned = [make_linear(N, 1024, V, bf16, {}, tune=True) for N, V in ((32768, 32000), (8192, 65536), (8192, 128256))]
    return checked + tuned


def make_plain(V: int, dtype: torch.dtype, terms: dict[str, float]) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        logits = 3 * torch.randn(300, V, generator=generator, device=device)
        return {"logits": logits.to(dtype), "labels": _labels(300, V, generator)}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"loss": cross_entropy(tensors["logits"], tensors["labels"], backend=backend, **terms)}

    name = f"plain V={V} {_short(dtype)}{' all terms' if terms else ''}"
    return Case("cross_entropy", name, inputs, run, keys=_keys(V))


def make_linear(N: int, D: int, V: int, dtype: torch.dtype, terms: dict[str, float], tune: bool = False) -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(N, D, generator=generator, device=device)
        weight = torch.randn(V, D, generator=generator, device=device) / D**0.5
        return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "labels": _labels(N, V, generator)}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"loss": linear_cross_entropy(**tensors, backend=backend, **terms)}

    name = f"linear {N}x{D}x{V} {_short(dtype)}{' all terms' if terms else ''}"
    tolerance = BF16_LOGITS if dtype == torch.bfloat16 else None
    return Case("cross_entropy", name, inputs, run, tolerance, keys=_keys(V), tune=tune)


def make_kl() -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "hidden": (300, 128),
            "weight": (32000, 128),
            "teacher_hidden": (300, 64),
            "teacher_weight": (32000, 64),
        }
        scale = {"weight": 128**-0.5, "teacher_weight": 64**-0.5}
        return {
            n: (torch.randn(s, generator=generator, device=device) * scale.get(n, 1.0)).bfloat16()
            for n, s in shapes.items()
        }

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"loss": linear_kl_divergence(**tensors, temperature=2.0, backend=backend)}

    teacher = ("teacher_hidden", "teacher_weight")
    return Case("cross_entropy", "linear KL 300x128x32000 bfloat16", inputs, run, BF16_LOGITS, constant=teacher)


def _labels(N: int, V: int, generator: torch.Generator) -> torch.Tensor:
    labels = torch.randint(0, V, (N,), generator=generator, device=generator.device)
    labels[::7] = -100
    return labels


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keys(V: int) -> dict[str, list[dict[str, int]]]:
    from flame.kernels.cross_entropy.triton_rows import tile_key

    tiles = [
        {"BLOCK": 8 * 32 * w * r, "num_warps": w, "UNROLL": u}
        for w in (8, 16, 32)
        for r in (1, 2, 4)
        for u in (1, 2, 4)
    ]
    return {tile_key(V): tiles}
