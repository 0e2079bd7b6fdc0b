"""Short convolution, gated norm and HGRN's elementwise scan beside flash-linear-attention's; the selective scan and the
log-normaliser gate alone, for which it has no kernel of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

BATCH, TOKENS = 8, 4096


def make_inputs(sizes: Mapping[str, tuple[int, ...]], device: torch.device, seed: int, small: bool) -> Tensors:
    """bf16 normal tensors; sizes that begin with (batch, tokens) are cut when small; log decays are log-sigmoids."""
    g = torch.Generator(device=device).manual_seed(seed)
    call = {}
    for name, size in sizes.items():
        if small and size[:2] == (BATCH, TOKENS):
            size = (2, 515, *size[2:])
        x = torch.randn(*size, generator=g, device=device)
        call[name] = (F.logsigmoid(x) if name == "log_decay" else x).bfloat16()
    return call


def our_convolution(backend: str | None = None) -> Call:
    from flame.kernels.short_convolution import short_convolution

    def call(i: Tensors) -> torch.Tensor:
        return short_convolution(
            i["x"], i["weight"], activation="silu", cu_seqlens=i.get("cu_seqlens"), backend=backend
        )[0]

    return call


def fla_convolution() -> Call:
    from fla.modules.convolution import causal_conv1d

    return lambda i: causal_conv1d(i["x"], i["weight"], activation="silu", cu_seqlens=i.get("cu_seqlens"))[0]


def our_norm(backend: str | None = None) -> Call:
    from flame.kernels.normalization import gated_rms_norm

    return lambda x: gated_rms_norm(x["x"], x["gate"], x["weight"], 1e-5, backend=backend)


def fla_norm() -> Call:
    from fla.modules.fused_norm_gate import rms_norm_gated

    return lambda x: rms_norm_gated(x["x"], x["gate"], x["weight"], None, activation="swish", eps=1e-5)


def our_residual_norm(backend: str | None = None) -> Call:
    from flame.kernels.normalization import rms_norm

    return lambda i: rms_norm(i["x"], i["weight"], 1e-5, i["residual"], backend=backend)[0]


def fla_residual_norm() -> Call:
    from fla.modules.layernorm import rms_norm

    return lambda i: rms_norm(i["x"], i["weight"], None, residual=i["residual"], eps=1e-5, prenorm=True)[0]


def our_scan(backend: str | None = None) -> Call:
    from flame.kernels.elementwise_scan import elementwise_scan

    return lambda x: elementwise_scan(x["x"], x["log_decay"], backend=backend)[0]


def fla_scan(chunked: bool) -> Call:
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    op = chunk_hgrn if chunked else fused_recurrent_hgrn
    return lambda x: op(x["x"], x["log_decay"])[0]


def our_gate(backend: str | None = None) -> Call:
    from flame.kernels.log_gate import log_gate

    def call(x: Tensors) -> torch.Tensor:
        weight, log_decay, _ = log_gate(x["x"], backend=backend)
        return weight + log_decay

    return call


def our_selective_scan(backend: str | None = None) -> Call:
    from flame.kernels.selective_scan import selective_scan

    def call(i: Tensors) -> torch.Tensor:
        A = -torch.nn.functional.softplus(i["A"].to(torch.promote_types(i["A"].dtype, torch.float32)))
        return selective_scan(i["x"], i["log_decay"], A, i["B"], i["C"], D=i["D"], z=i["z"], backend=backend)[0]

    return call


def benchmarks() -> list[Benchmark]:
    every = BATCH * TOKENS
    found = []
    for C in (2048, 4096, 1024):
        sizes: dict[str, tuple[int, ...]] = {"x": (BATCH, TOKENS, C), "weight": (C, 4)}
        found.append(_benchmark(f"conv+silu C{C} W4", sizes, our_convolution, fla_convolution, 10 * every * C))
        if C == 2048:
            found.append(_packed(found[-1]))
    sizes = {"x": (BATCH, TOKENS, 2048), "residual": (BATCH, TOKENS, 2048), "weight": (2048,)}
    found.append(_benchmark("rms_norm+residual C2048", sizes, our_residual_norm, fla_residual_norm, 16 * every * 2048))
    for H, D in ((16, 128), (4, 512)):
        sizes = {"x": (BATCH, TOKENS, H, D), "gate": (BATCH, TOKENS, H, D), "weight": (D,)}
        found.append(_benchmark(f"gated_rms_norm H{H} D{D}", sizes, our_norm, fla_norm, 16 * every * H * D))
    sizes = {"x": (BATCH, TOKENS, 2048), "log_decay": (BATCH, TOKENS, 2048)}
    found.append(_benchmark("hgrn scan E2048", sizes, our_scan, lambda: fla_scan(False), 16 * every * 2048))
    found.append(_benchmark("log_gate H16 M128", {"x": (BATCH, TOKENS, 16, 128)}, our_gate, None, 20 * every * 2048))
    rows = dict.fromkeys(("x", "log_decay", "z"), (BATCH, TOKENS, 2048))
    maps = {"A": (2048, 16), "B": (BATCH, TOKENS, 16), "C": (BATCH, TOKENS, 16), "D": (2048,)}
    found.append(_benchmark("selective scan E2048 S16", rows | maps, our_selective_scan, None, 22 * every * 2048))
    return found


def _packed(dense: Benchmark) -> Benchmark:
    """The same rows as documents of 100 to 1500 tokens, packed into one row."""

    def inputs(device: torch.device, seed: int, small: bool) -> Tensors:
        call = dense.inputs(device, seed, small)
        call["x"] = call["x"].flatten(0, 1)[None]
        lengths = torch.randint(100, 1500, (1000,), generator=torch.Generator().manual_seed(0))
        ends = lengths.cumsum(0)
        tokens = call["x"].shape[1]
        bounds = torch.cat([torch.tensor([0]), ends[ends < tokens], torch.tensor([tokens])])
        return call | {"cu_seqlens": bounds.to(device, torch.int32)}

    return replace(dense, name=f"packed {dense.name}", inputs=inputs)


def _benchmark(name: str, sizes, mine, peer, moved: float) -> Benchmark:
    return Benchmark(
        op="channels",
        name=f"{name} B{BATCH} T{TOKENS}",
        inputs=lambda device, seed, small: make_inputs(sizes, device, seed, small),
        implementations={"flame": mine} if peer is None else {"flame": mine, "fla": peer},
        reference=mine("chunked" if "norm" not in name and "conv" not in name else "reference"),
        bytes_moved=moved,
    )
