"""Gated slot attention (GSA's two passes and the softmax between them) beside flash-linear-attention's chunk_gsa."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

SHAPES = ((8, 4096, 4, 256, 256, 64), (1, 32768, 4, 256, 256, 64))  # batch, tokens, heads, K, V, slots


def make_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, K, V, M = shape
    if small:
        B, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)
    normal = {
        name: torch.randn(B, T, H, width, generator=g, device=device) for name, width in zip("qkvs", (K, K, V, M))
    }
    log_decay = F.logsigmoid(normal["s"]) / 8
    weight = (1 - log_decay.exp()).bfloat16()
    call = {name: normal[name].bfloat16() for name in "qkv"}
    return call | {"weight": weight, "log_decay": log_decay.bfloat16()}


def ours(backend: str | None = None) -> Call:
    from flame.kernels.linear_attention import linear_attention

    def call(x: Tensors) -> torch.Tensor:
        q, k, v, weight, log_decay = x.values()
        scores, _ = linear_attention(q, k, weight, value_decay=log_decay, backend=backend)
        return linear_attention(torch.softmax(scores, -1), weight, v, key_decay=log_decay, scale=1.0, backend=backend)[
            0
        ]

    return call


def fla() -> Call:
    from fla.ops.gsa import chunk_gsa

    return lambda x: chunk_gsa(x["q"], x["k"], x["v"], x["weight"], x["log_decay"], scale=x["q"].shape[-1] ** -0.5)[0]


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(shape) for shape in SHAPES]


def make_benchmark(shape: tuple[int, ...]) -> Benchmark:
    B, T, H, K, V, M = shape
    rows = B * T * H
    return Benchmark(
        op="slot_attention",
        name=f"gsa B{B} T{T} H{H} K{K} V{V} M{M}",
        inputs=lambda device, seed, small: make_inputs(shape, device, seed, small),
        implementations={"flame": ours, "fla": fla},
        reference=ours("chunked"),
        # q, k, v, weight, decay and o once forward; again with do and five gradients backward.
        bytes_moved=2 * rows * ((2 * K + 2 * V + 2 * M) + (4 * K + 3 * V + 4 * M)),
        flops=12.0 * rows * (K + V) * M,
    )
