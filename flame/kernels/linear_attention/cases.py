"""Cases by which `flame doctor` proves and tunes linear attention on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flame.kernels import tiles
from flame.kernels.checking import RAGGED, Case, Tensors
from flame.kernels.linear_attention import linear_attention
from flame.kernels.linear_attention.head_scale import scale_heads
from flame.kernels.linear_attention.triton_layout import backward_key, states_key
from flame.kernels.linear_attention.triton_wide import parts

KINDS = ("none", "head", "scalar", "key", "value", "bonus")
# Head sizes of the models: GLA, HGRN2, Mamba2 (N=128, P=64), RWKV, GSA's passes, RetNet and GLA at 1.3B, Based.
DIMS = ((64, 64), (128, 128), (128, 64), (64, 128), (128, 256), (64, 256), (256, 64), (256, 256), (256, 512), (153, 64))


@dataclass(frozen=True)
class Shape:
    kind: str
    batch: int
    tokens: int
    heads: tuple[int, int, int]
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    strong: bool = False
    packed: bool = False
    state: bool = False


def cases() -> list[Case]:
    fp16, fp32 = torch.float16, torch.float32
    checked = [Shape(kind, 2, 300, (2, 2, 2), K, V) for kind in KINDS for K, V in DIMS]
    for kind in KINDS:
        checked += [Shape(kind, 2, tokens, (2, 2, 2), 64, 64, state=True) for tokens in (1, 63, 64, 65)]
        checked += [
            Shape(kind, 1, 4096 + 7, (2, 2, 2), 128, 128, state=True),
            Shape(kind, 1, RAGGED[-1], (2, 2, 2), 128, 128, packed=True, state=True),
            Shape(kind, 1, 200, (4, 2, 2), 64, 64),
            Shape(kind, 1, 200, (1, 1, 4), 64, 64),
            Shape(kind, 1, 200, (2, 2, 2), 64, 64, fp32, state=True),
            Shape(kind, 1, 200, (2, 2, 2), 64, 64, fp16, state=True),
        ]
    checked += [Shape(kind, 1, 700, (2, 2, 2), 128, 128, strong=True) for kind in KINDS[2:]]
    # Many heads that share queries and keys, as Mamba-2 has them: enough rows that one program walks several heads.
    checked += [
        Shape("scalar", 1, 700, (2, 2, 64), 128, 64),
        Shape("scalar", 1, 4096 + 7, (1, 1, 16), 128, 64, state=True),
    ]
    checked += [Shape("scalar", 1, RAGGED[-1], (1, 1, 16), 128, 64, packed=True, state=True)]
    checked += [
        Shape("head", 1, RAGGED[-1], (2, 2, 2), 256, 512, packed=True, state=True),
        Shape("head", 1, 4096 + 7, (2, 2, 2), 256, 512, state=True),
    ]
    checked += [Shape("scalar", 1, 700, (1, 1, 64), 128, 64, strong=True), Shape("scalar", 1, 200, (2, 2, 2), 96, 64)]
    tuned = [Shape(kind, 8, 4096, (16, 16, 16), K, V) for kind in KINDS[:5] for K, V in ((128, 128), (64, 64))]
    tuned += [Shape("head", 8, 4096, (8, 8, 8), 256, 256), Shape("key", 8, 4096, (4, 4, 4), 256, 256)]
    tuned += [Shape("scalar", 8, 4096, (1, 1, 64), 128, 64), Shape("key", 8, 4096, (4, 4, 4), 128, 256)]
    tuned += [Shape("value", 8, 4096, (4, 4, 4), 256, 64), Shape("key", 8, 4096, (4, 4, 4), 64, 256)]
    return (
        [make_case(shape) for shape in checked]
        + [make_case(shape, tune=True) for shape in tuned]
        + [scale_case(), scaled_case()]
    )


def scale_case() -> Case:
    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator(device).manual_seed(seed)
        factor = torch.rand(2, 301, 3, generator=g, device=device)
        return {"x": torch.randn(2, 301, 3, 64, generator=g, device=device).bfloat16(), "factor": factor}

    def run(tensors: Tensors, backend: str | None) -> Tensors:
        return {"y": scale_heads(**tensors, backend=backend)}

    return Case("linear_attention", "scale_heads", inputs, run)


def scaled_case() -> Case:
    """Mamba-2's: heads that share keys, values times a step."""

    def inputs(device: torch.device, seed: int) -> Tensors:
        g = torch.Generator(device).manual_seed(seed)
        q, k = torch.randn(2, 1, 500, 1, 128, generator=g, device=device).bfloat16().unbind(0)
        step = F.softplus(torch.randn(1, 500, 8, generator=g, device=device) - 2)
        rate = torch.randn(8, generator=g, device=device).exp()
        v = torch.randn(1, 500, 8, 64, generator=g, device=device).bfloat16()
        return {"q": q, "k": k, "v": v, "step": step, "rate": rate}

    def run(t: Tensors, backend: str | None) -> Tensors:
        decay = -t["rate"] * t["step"]
        o, _ = linear_attention(
            t["q"], t["k"], t["v"], scalar_decay=decay, value_scale=t["step"], scale=1.0, backend=backend
        )
        return {"o": o}

    return Case("linear_attention", "scaled values B=1 T=500 H=1/1/8 K=128 V=64 bfloat16", inputs, run)


def make_case(shape: Shape, tune: bool = False) -> Case:
    s = shape
    heads = str(s.heads[0]) if len(set(s.heads)) == 1 else "/".join(map(str, s.heads))
    flags = "".join(f" {flag}" for flag in ("strong", "packed", "state") if getattr(s, flag))
    dtype = str(s.dtype).removeprefix("torch.")
    name = f"{s.kind} B={s.batch} T={s.tokens} H={heads} K={s.K} V={s.V} {dtype}{flags}"
    # RetNet's rates are constants; one number summed over all time has no relative accuracy in bf16 anyway.
    constant = ("head_decay",) if s.kind == "head" else ()
    return Case(
        op="linear_attention",
        name=name,
        inputs=lambda device, seed: make_inputs(shape, device, seed),
        run=run,
        constant=constant,
        keys=tile_keys(shape),
        tune=tune,
    )


def run(inputs: Tensors, backend: str | None) -> Tensors:
    # Over hundreds of tokens the recurrence takes minutes; in fp64 the chunked form equals it to 1e-9 (tests prove it).
    if backend == "reference" and inputs["q"].shape[1] > 64:
        backend = "chunked"
    o, final = linear_attention(**inputs, output_final_state=True, backend=backend)
    return {"o": o} if final is None else {"o": o, "final": final}


def make_inputs(s: Shape, device: torch.device, seed: int) -> Tensors:
    """Normal q, k, v; log-sigmoid decays: near 0, or strong enough to overflow a careless factorization."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    H, sequences = max(s.heads), len(RAGGED) - 1 if s.packed else s.batch
    call = {
        name: normal(s.batch, s.tokens, count, width).to(s.dtype)
        for name, count, width in zip("qkv", s.heads, (s.K, s.K, s.V))
    }
    factor = 8.0 if s.strong else 1 / 16
    width = {"key": (s.K,), "bonus": (s.K,), "value": (s.V,)}.get(s.kind, ())
    if s.kind == "head":
        call["head_decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device=device, dtype=torch.float32))))
    elif s.kind == "scalar":
        call["scalar_decay"] = F.logsigmoid(normal(s.batch, s.tokens, H)) * factor
    elif s.kind != "none":
        decay = F.logsigmoid(normal(s.batch, s.tokens, H, *width)) * factor
        call["value_decay" if s.kind == "value" else "key_decay"] = decay.to(s.dtype)
    if s.kind == "bonus":
        call["bonus"] = normal(H, s.K)
    if s.state:
        call["initial_state"] = normal(sequences, H, s.K, s.V)
    if s.packed:
        call["cu_seqlens"] = torch.tensor(RAGGED, dtype=torch.int32, device=device)
    return call


def tile_keys(s: Shape) -> dict[str, list[tiles.Tile]]:
    """Keys of the kernels a problem launches, as the passes ask for them, and tiles worth timing."""
    K, V = s.K // parts(s.K), s.V // parts(s.V)
    if s.kind in ("none", "head", "scalar"):
        return sweep_keys(s, K, V)
    K, V = (V, K) if s.kind == "value" else (K, V)
    choices = {"prepare": prepares(), "key": vectors("BV"), "inter": vectors("BK")}
    found = {tiles.key(name, K=K, V=V, dtype=s.dtype): tried for name, tried in choices.items()}
    finishing = {"finish": finishes()}
    return found | {tiles.key(name, K=K, V=0, dtype=s.dtype): tried for name, tried in finishing.items()}


def sweep_keys(s: Shape, K: int, V: int) -> dict[str, list[tiles.Tile]]:
    sizes = {"forward": (K, V), "dq": (V, K), "dk": (V, K), "dv": (K, V)}
    found = {tiles.key(name, kind=s.kind, D=D, E=E, dtype=s.dtype): sweeps() for name, (D, E) in sizes.items()}
    if s.dtype == torch.float32:
        return found
    readers = s.heads[0] if s.heads[0] == s.heads[1] else 0
    shared = K == s.K and (0 < readers < max(s.heads) or V < s.V)
    found[backward_key(s.kind, K, V, shared, s.dtype)] = backwards(max(K, V))
    if s.kind == "scalar" and readers == max(s.heads) and max(s.K, s.V) <= 128:
        found[states_key(s.kind, K, V, s.dtype)] = states()
    return found


def backwards(width: int) -> list[tiles.Tile]:
    """Ways to make the gradients of heads of up to `width`: see `triton_chunk_passes`."""
    rows = [(64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3), (64, 8, 2), (128, 4, 1)]
    roles = [{"FORM": 2, "BV": bv, "num_warps": warps, "num_stages": stages} for bv, warps, stages in rows]
    return [{"FORM": 0}, *([{"FORM": 1, "num_warps": 4, "num_stages": 1}] if width <= 128 else []), *roles]


def states() -> list[tiles.Tile]:
    rows = [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)]
    return [{"BK": bk, "BV": bv, "num_warps": warps, "num_stages": stages} for bk, bv, warps, stages in rows]


def sweeps() -> list[tiles.Tile]:
    rows = [(64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2), (32, 128, 8, 2)]
    rows += [(32, 64, 8, 2), (32, 64, 4, 2)]
    return [{"BT": bt, "BE": be, "num_warps": warps, "num_stages": stages} for bt, be, warps, stages in rows]


def vectors(columns: str) -> list[tiles.Tile]:
    rows = [(64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2)]
    return [{columns: width, "num_warps": warps, "num_stages": stages} for width, warps, stages in rows]


def prepares() -> list[tiles.Tile]:
    rows = [(64, 4, 1), (32, 4, 0), (32, 4, 1), (64, 8, 0), (64, 8, 1)]
    return [{"BT": 64, "BK": width, "num_warps": warps, "DOTS": dots} for width, warps, dots in rows]


def finishes() -> list[tiles.Tile]:
    rows = [(64, 8, 3, 0), (64, 8, 3, 3), (32, 4, 3, 0), (32, 4, 2, 3), (32, 4, 1, 3), (32, 8, 3, 3), (16, 4, 3, 3)]
    return [{"BK": bk, "num_warps": warps, "num_stages": stages, "DOTS": dots} for bk, warps, stages, dots in rows]
