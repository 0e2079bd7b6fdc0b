"""Cases by which `flame doctor` proves and tunes mesa on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels import tiles
from flame.kernels.checking import RAGGED, Case, Tensors
from flame.kernels.mesa import mesa

FACTORS = {"fast": 1.0, "slow": 1 / 16, "open": 1 / 256}  # of log-sigmoid decays


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    K: int
    V: int
    heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    decay: str = "slow"
    packed: bool = False
    state: bool = False
    steps: int = 30
    scale_gradient: bool = True


def cases() -> list[Case]:
    fp16, fp32 = torch.float16, torch.float32
    checked = [Shape(2, 300, K, K, decay=decay) for K in (64, 128) for decay in FACTORS]
    checked += [Shape(2, tokens, 64, 64, state=True) for tokens in (1, 63, 64, 65)]
    checked += [Shape(1, RAGGED[-1], K, K, packed=True, state=True) for K in (64, 128)]
    checked += [Shape(1, 200, K, K, dtype=dtype, state=True) for K in (64, 128) for dtype in (fp16, fp32)]
    checked += [Shape(1, 200, 96, 64), Shape(1, 200, 64, 128), Shape(1, 200, 128, 256)]
    checked += [Shape(1, 4096 + 7, 128, 128, state=True), Shape(1, 500, 128, 128, steps=4)]
    checked += [Shape(2, 300, K, K, scale_gradient=False) for K in (64, 128)]
    tuned = [Shape(8, 4096, K, K, heads=16) for K in (64, 128)]
    return [make_case(shape) for shape in checked] + [make_case(shape, tune=True) for shape in tuned]


def make_case(shape: Shape, tune: bool = False) -> Case:
    s = shape
    dtype = str(s.dtype).removeprefix("torch.")
    flags = "".join(f" {flag}" for flag in ("packed", "state") if getattr(s, flag))
    flags += f" steps={s.steps}" * (s.steps != 30) + " as it is" * (not s.scale_gradient)
    return Case(
        op="mesa",
        name=f"{s.decay} B={s.batch} T={s.tokens} H={s.heads} K={s.K} V={s.V} {dtype}{flags}",
        inputs=lambda device, seed: make_inputs(shape, device, seed),
        run=lambda inputs, backend: run(shape, inputs, backend),
        keys={tiles.key("solve", K=s.K, dtype=s.dtype): solves()},
        tune=tune,
    )


def run(s: Shape, inputs: Tensors, backend: str | None) -> Tensors:
    # Over hundreds of tokens the recurrence takes minutes; in fp64 the chunked form equals it to 1e-8 (tests prove it).
    if backend == "reference" and inputs["q"].shape[1] > 64:
        backend = "chunked"
    o, final = mesa(
        **inputs,
        steps=s.steps,
        scale_gradient=s.scale_gradient,
        normalize=True,
        output_final_state=True,
        backend=backend,
    )
    return {"o": o} if final is None else {"o": o, "keys": final[0], "values": final[1]}


def make_inputs(s: Shape, device: torch.device, seed: int) -> Tensors:
    """Normal q, k, v; decays, strengths and regularizers as MesaNet makes them."""
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    tokens, sequences = (s.batch, s.tokens, s.heads), len(RAGGED) - 1 if s.packed else s.batch
    call = {name: normal(*tokens, width).to(s.dtype) for name, width in zip("qkv", (s.K, s.K, s.V))}
    call["log_decay"] = F.logsigmoid(normal(*tokens)) * FACTORS[s.decay]
    call["beta"] = normal(*tokens).sigmoid()
    call["regularizer"] = F.softplus(normal(s.heads, s.K)) + 0.25
    if s.state:
        root = normal(sequences, s.heads, s.K, s.K)
        call["key_state"] = root @ root.mT / s.K
        call["value_state"] = normal(sequences, s.heads, s.K, s.V)
    if s.packed:
        call["cu_seqlens"] = torch.tensor(RAGGED, dtype=torch.int32, device=device)
    return call


def solves() -> list[tiles.Tile]:
    rows = [(2, 4), (1, 4), (3, 4), (2, 8)]
    return [{"CHECK": check, "num_warps": warps, "num_stages": 1} for check, warps in rows]
