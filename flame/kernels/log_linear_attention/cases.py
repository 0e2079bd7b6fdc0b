"""Cases by which `flame doctor` proves log-linear attention on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels import tiles
from flame.kernels.checking import RAGGED, Case, Tensors
from flame.kernels.log_linear_attention import log_linear_attention, log_linear_delta_rule

LEVELS = 13


@dataclass(frozen=True)
class Shape:
    """Head sizes are Mamba-2's (N = 128, P = 64, shared q and k), or 128 everywhere for the delta rule and `wide`."""

    delta: bool
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    strong: bool = False  # decays of up to 20 a token
    packed: bool = False
    levels: int = LEVELS
    wide: bool = False

    @property
    def value(self) -> int:
        return 128 if self.delta or self.wide else 64


TRIALS: dict[str, list[tiles.Tile]] = {
    "outputs": [
        {"BV": BV, "num_warps": warps, "num_stages": stages}
        for BV in (64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ],
    "states": [
        {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": 2}
        for BK, BV in ((128, 64), (128, 128), (64, 128), (64, 64))
        for warps in (4, 8)
    ],
    "nodes": [
        {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": stages}
        for BK, BV, warps in ((128, 64, 4), (64, 128, 4), (128, 128, 8), (64, 64, 4), (128, 64, 8))
        for stages in (2, 3, 4)
    ],
    "queries": [{"num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (1, 2, 3)],
    "keys": [{"num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (1, 2, 3)],
}


def cases() -> list[Case]:
    checked: list[Shape] = []
    for delta in (False, True):
        checked += [Shape(delta, tokens) for tokens in (1, 63, 64, 65, 300, 4096 + 7)]
        checked += [
            Shape(delta, RAGGED[-1], packed=True),
            Shape(delta, 300, torch.float16),
            Shape(delta, 300, levels=4),
        ]
        checked += [Shape(delta, 700, strong=True)]
    checked += [Shape(False, 300, torch.float32)]
    checked += [Shape(False, tokens, wide=True) for tokens in (300, 4096 + 7)]
    checked += [Shape(False, RAGGED[-1], packed=True, wide=True), Shape(False, 700, strong=True, wide=True)]
    produced = (Shape(False, 4096), Shape(True, 4096), Shape(False, 4096, wide=True))
    return [make_case(shape) for shape in checked] + [make_case(shape, tune=True) for shape in produced]


def make_case(s: Shape, tune: bool = False) -> Case:
    kind = "delta" if s.delta else "scalar"
    flags = "".join(f" {flag}" for flag in ("strong", "packed", "wide") if getattr(s, flag))
    dtype = str(s.dtype).removeprefix("torch.")
    return Case(
        op="log_linear_attention",
        name=f"{kind} T={s.tokens} L={s.levels} {dtype}{flags}" + (" production" if tune else ""),
        inputs=lambda device, seed: make_inputs(s, device, seed, 8 if tune else 1, 16 if tune else 2),
        run=run,
        tolerance=1e-2 if s.delta else None,  # that of the delta rule
        keys=tile_keys(s),
        tune=tune,
    )


def tile_keys(s: Shape) -> dict[str, list[tiles.Tile]]:
    """Keys of the op's own kernels with the tiles worth trying; the delta rule runs other ops' kernels."""
    if s.delta or s.dtype == torch.float32:
        return {}
    return {tiles.key(name, K=128, V=s.value, dtype=s.dtype): trials for name, trials in TRIALS.items()}


def run(inputs: Tensors, backend: str | None) -> Tensors:
    # In fp64 the chunked form equals the recurrence to 1e-9 (tests prove it) and takes seconds instead of minutes.
    backend = "chunked" if backend == "reference" and inputs["q"].shape[1] > 64 else backend
    if "beta" in inputs:
        return {"o": log_linear_delta_rule(**inputs, normalize=True, backend=backend)[0]}
    return {"o": log_linear_attention(**inputs, backend=backend)[0]}


def make_inputs(s: Shape, device: torch.device, seed: int, batch: int, heads: int) -> Tensors:
    """Normal q, k, v; softplus level weights and decays as the models start with, or strong decays."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, s.tokens, *shape, generator=g).to(device)

    shared = heads if s.delta or s.wide else 1
    call = {"q": normal(shared, 128), "k": normal(shared, 128), "v": normal(heads, s.value)}
    call = {name: x.to(s.dtype) for name, x in call.items()}
    call["level_weights"] = F.softplus(normal(heads, s.levels))
    decay = -F.softplus(normal(heads) - 2)
    call["scalar_decay"] = 20 * decay.clamp(min=-1) if s.strong else decay
    if s.delta:
        call["beta"] = 2 * normal(heads).sigmoid()
    if s.packed:
        call["cu_seqlens"] = torch.tensor(RAGGED, dtype=torch.int32, device=device)
    return call
