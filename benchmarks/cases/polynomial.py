"""Based and ReBased beside flash-linear-attention's kernels: all pairs, and (Based) fused chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Benchmark, Call, Tensors

SHAPES = ((8, 2048, 16, 16, 64), (8, 4096, 16, 16, 64), (1, 32768, 16, 16, 64))  # batch, tokens, heads, d, V
SCORES = {"based": ((1.0, 1.0, 0.5), 1e-6), "rebased": ((0.0, 0.0, 1.0), 1e-5)}


def make_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, d, V = shape
    if small:
        B, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)
    sizes = zip("qkv", (d, d, V))
    return {name: torch.randn(B, T, H, width, generator=g, device=device).bfloat16() for name, width in sizes}


def ours(kind: str, backend: str | None = None) -> Call:
    from flame.kernels.polynomial_attention import polynomial_attention

    coefficients, eps = SCORES[kind]
    return lambda x: polynomial_attention(**x, coefficients=coefficients, eps=eps, backend=backend)[0]


def fla_parallel(kind: str) -> Call:
    from fla.ops.based import parallel_based
    from fla.ops.rebased import parallel_rebased

    if kind == "based":
        return lambda x: parallel_based(**x)
    return lambda x: parallel_rebased(**x, eps=1e-5, use_scale=True, use_normalize=True)


def fla_chunked() -> Call:
    from fla.ops.based import fused_chunk_based

    return lambda x: fused_chunk_based(**x)


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(kind, shape) for kind in SCORES for shape in SHAPES]


def make_benchmark(kind: str, shape: tuple[int, ...]) -> Benchmark:
    B, T, H, d, V = shape
    rows = B * T * H
    peers: dict[str, Callable[[], Call]] = {"flame": lambda: ours(kind), "fla parallel": lambda: fla_parallel(kind)}
    if kind == "based":
        peers["fla chunked"] = fla_chunked
    return Benchmark(
        op="polynomial_attention",
        name=f"{kind} B{B} T{T} H{H} d{d} V{V}",
        inputs=lambda device, seed, small: make_inputs(shape, device, seed, small),
        implementations=peers,
        reference=ours(kind, "reference"),
        bytes_moved=2.0 * rows * ((2 * d + 2 * V) + (4 * d + 3 * V)),
        flops=12.0 * rows * (d * (d + 3) // 2 + 1) * V,
    )
