"""Cases by which `flame doctor` proves and tunes the delta rule on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from flame.kernels import tiles
from flame.kernels.checking import Case, Tensors
from flame.kernels.delta_rule import delta_rule, dplr_delta_rule
from flame.kernels.delta_rule.plan import LAUNCHES, tile_key

# Forms of the models: DeltaNet, Gated DeltaNet, its grouped values, DeltaProduct, Comba, Kimi Delta Attention,
# RWKV-7.
KINDS = ("plain", "scalar", "grouped", "product", "comba", "key", "untied")
SWEEPS = ("forward", "states", "reverse", "maps", "reverse maps")
LENGTHS = (0, 5, 5, 75, 76, 140, 270, 970)  # bounds of ragged documents: short, none, odd, one token, a chunk, long
# What bf16 keeps of pseudo-values and inverted systems adds up along a chunk; the peers store the same.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Shape:
    kind: str
    batch: int
    tokens: int
    heads: int
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    strong: bool = False  # decays of up to 20 a token
    hard: bool = False  # correlated keys, strengths near 2, no decay
    packed: bool = False
    state: bool = True


def cases() -> list[Case]:
    checked = [Shape(kind, 2, 200, 2, 128, 128) for kind in KINDS]
    checked += [Shape(kind, 2, 200, 2, 64, 64) for kind in ("plain", "scalar", "key", "untied")]
    checked += [Shape("scalar", 2, 200, 1, 256, 512), Shape("scalar", 2, 200, 2, 96, 192)]
    for kind, width in (("scalar", 128), ("key", 128), ("untied", 64)):
        checked += [Shape(kind, 2, tokens, 2, width, width) for tokens in (1, 63, 64, 65)]
        checked += [Shape(kind, 1, 200, 2, width, width, torch.float16)]
    for kind in ("plain", "scalar", "key", "untied"):
        checked += [
            Shape(kind, 1, 4096 + 7, 2, 128, 128),  # long enough to be cut in segments
            Shape(kind, 1, LENGTHS[-1], 2, 128, 128, packed=True),
        ]
    checked += [Shape(kind, 1, 700, 2, 128, 128, strong=True) for kind in ("scalar", "comba", "key")]
    checked += [Shape("untied", 1, 700, 2, 64, 64, strong=True), Shape("untied", 1, 4096 + 7, 2, 64, 64)]
    checked += [Shape("untied", 1, LENGTHS[-1], 2, 64, 64, packed=True)]
    checked += [Shape("scalar", 1, 200, 2, 128, 128, hard=True), Shape("scalar", 1, 4103, 1, 256, 512)]
    checked += [Shape(kind, 2, 200, 2, 32, 32) for kind in ("plain", "scalar", "key", "untied")]
    checked += [Shape("product", 2, 70, 2, 16, 32)]
    checked.append(Shape("scalar", 1, 1037, 2, 256, 768))  # 512 values and a state's 256 columns: context parallelism
    tuned = [Shape(kind, 8, 4096, 16, 128, 128, state=False) for kind in ("plain", "scalar", "key")]
    tuned += [Shape("scalar", 8, 4096, 6, 256, 512, state=False), Shape("scalar", 8, 4096, 16, 64, 64, state=False)]
    tuned += [Shape("untied", 8, 4096, 32, 64, 64, state=False)]
    return [make_case(shape) for shape in checked] + [make_case(shape, tune=True) for shape in tuned]


def make_case(s: Shape, tune: bool = False) -> Case:
    flags = "".join(f" {flag}" for flag in ("strong", "hard", "packed", "state") if getattr(s, flag))
    dtype = str(s.dtype).removeprefix("torch.")
    return Case(
        op="delta_rule",
        name=f"{s.kind} B={s.batch} T={s.tokens} H={s.heads} K={s.K} V={s.V} {dtype}{flags}",
        inputs=lambda device, seed: make_inputs(s, device, seed),
        run=run,
        # Where keys resemble each other, what bf16 loses of one write stays in every later read.
        tolerance=4e-2 if s.hard else TOLERANCE,
        keys=tile_keys(s),
        tune=tune,
    )


def run(inputs: Tensors, backend: str | None) -> Tensors:
    # In fp64 the chunked form equals the recurrence to 1e-9 (tests prove it) and takes seconds instead of minutes.
    backend = "chunked" if backend == "reference" and inputs["q"].shape[1] > 64 else backend
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    if "a" in inputs:
        o, final = dplr_delta_rule(**inputs, **options)
    else:
        o, final = delta_rule(**inputs, exclusive="erase_key" in inputs, normalize=True, **options)
    return {"o": o} if final is None else {"o": o, "final": final}


def make_inputs(s: Shape, device: torch.device, seed: int) -> Tensors:
    """Normal q, k, v; strengths in (0, 2); softplus decays as the models start with, or strong ones."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device)

    B, T, H = s.batch, s.tokens, s.heads
    rows, wide = T * (3 if s.kind == "product" else 1), H * (2 if s.kind == "grouped" else 1)
    call = {"q": normal(B, T, H, s.K), "k": normal(B, rows, H, s.K), "v": normal(B, rows, wide, s.V)}
    if s.hard:
        call["k"] = normal(1, 1, H, s.K) + call["k"]
    if s.kind == "comba":
        call["erase_key"] = normal(B, T, H, s.K)
    if s.kind == "untied":
        kappa = F.normalize(normal(B, T, H, s.K), dim=-1)
        call |= {"a": -kappa, "b": kappa * normal(B, T, H, s.K).sigmoid()}
    call = {name: x.to(s.dtype) for name, x in call.items()}
    if s.kind != "untied":
        call["beta"] = 2 * normal(B, rows, wide).sigmoid() if not s.hard else 1.98 + 0 * normal(B, rows, wide)
    by_channel = s.kind in ("key", "untied")
    decay = -F.softplus(normal(B, T, wide, *(s.K,) * by_channel) - 2)
    decay = decay * (1e-3 if s.hard else 1.0)
    if s.strong:
        decay = -20 * torch.rand(decay.shape, generator=g).to(device)
    if s.kind != "plain":
        call["key_decay" if by_channel else "scalar_decay"] = decay
    if s.state:
        call["initial_state"] = normal(len(LENGTHS) - 1 if s.packed else B, wide, s.K, s.V)
    if s.packed:
        call["cu_seqlens"] = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    return call


def tile_keys(s: Shape) -> dict[str, list[tiles.Tile]]:
    """Keys of the kernels that a problem of this shape may launch, and tiles worth timing."""
    decay = {"plain": "none", "key": "key", "untied": "key"}.get(s.kind, "scalar")
    choices = {"form": slices((64, 128), (4, 8)), "invert": [], "merge": [], "rows": rows(), "scores": scores()}
    choices |= {name: sweeps(s.K) for name in SWEEPS}
    if decay == "key":
        choices |= {"form rows": slices((32, 64, 128), (4, 8)), "form by halves": slices((16, 32), (1,))}
        choices["rows by halves"] = []
    if s.kind == "untied":
        names = (*SWEEPS, "form", "gate", *("gradients " + "+".join(parts).lower() for parts in LAUNCHES))
        choices = {"invert": [], "merge": [], **{f"dplr {name}": [] for name in names}}
    erase = s.kind in ("comba", "key", "untied")  # a decay per key makes read rows of its own
    return {tile_key(name, decay, s.K, s.V, s.dtype, erase): candidates for name, candidates in choices.items()}


def slices(widths: tuple[int, ...], warps: tuple[int, ...]) -> list[tiles.Tile]:
    return [{"SLICE": width, "num_warps": count, "num_stages": 1} for width in widths for count in warps]


def sweeps(K: int) -> list[tiles.Tile]:
    # Values 32 wide with one stage are compiled to accesses out of bounds by Triton 3.6.
    choices = [(64, 4, 1), (64, 4, 2), (32, 4, 2), (128, 8, 1), (64, 8, 1)]
    if K > 128:
        choices = [(32, 4, 2), (64, 8, 1), (64, 8, 2)]
    return [{"BV": width, "num_warps": warps, "num_stages": stages} for width, warps, stages in choices]


def rows() -> list[tiles.Tile]:
    choices = [(64, 64, 4, 1), (64, 64, 8, 1), (128, 64, 8, 1), (64, 128, 8, 1), (64, 64, 4, 2)]
    return [{"TK": tk, "BV": bv, "num_warps": warps, "num_stages": stages} for tk, bv, warps, stages in choices]


def scores() -> list[tiles.Tile]:
    return [{"BV": bv, "num_warps": warps, "num_stages": 1} for bv, warps in ((64, 4), (64, 8), (128, 8))]
