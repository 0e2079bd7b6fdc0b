"""log_linear_attention beside flash-linear-attention's log_linear_attn, and one plain pass a level as it was done before."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

# batch, tokens, heads, heads of q and k, K, V: the common shape, the 340M model's, a long row
SHAPES = ((8, 4096, 16, 16, 128, 128), (8, 4096, 32, 1, 128, 64), (1, 32768, 16, 16, 128, 128))


def make_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, shared, K, V = shape
    if small:
        B, T = 1, min(T, 4096)
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(B, T, *size, generator=g, device=device)

    q, k, v = normal(shared, K).bfloat16(), normal(shared, K).bfloat16(), normal(H, V).bfloat16()
    weights = F.softplus(normal(H, 1 + math.ceil(math.log2(T)))).bfloat16()  # the peer takes no other dtype
    return {"q": q, "k": k, "v": v, "level_weights": weights, "scalar_decay": -F.softplus(normal(H) - 4)}


def ours(backend: str | None = None) -> Call:
    from flame.kernels.log_linear_attention import log_linear_attention

    return lambda inputs: log_linear_attention(**inputs, backend=backend)[0]


def by_levels() -> Call:
    from flame.kernels.log_linear_attention import levels, problem

    def call(i: Tensors) -> torch.Tensor:
        q, k, v, weights, decay = i.values()
        scale = q.shape[-1] ** -0.5
        return levels.by_levels(problem.Problem("benchmark", q, k, v, weights, decay, None, scale, None, None))

    return call


def fla() -> Call:
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    def call(i: Tensors) -> torch.Tensor:
        q, k, v, weights, decay = i.values()
        return chunk_log_linear_attn(q, k, v, decay, weights, scale=q.shape[-1] ** -0.5)[0]

    return call


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(shape) for shape in SHAPES]


def make_benchmark(shape: tuple[int, ...]) -> Benchmark:
    B, T, H, shared, K, V = shape
    rows = B * T * H
    # q, k, v, o forward; q, k, v, do and their gradients backward; nothing for states, which a kernel may keep on chip.
    return Benchmark(
        op="log_linear_attention",
        name=f"log-linear B{B} T{T} H{H} K{K} V{V}" + ("" if shared == H else f" q,k of {shared}"),
        inputs=lambda device, seed, small: make_inputs(shape, device, seed, small),
        implementations={"flame": ours, "fla": fla, "a pass a level": by_levels},
        reference=ours("chunked"),
        bytes_moved=2 * (B * T * shared * 6 * K + rows * 5 * V),
        # One write and half of log2 T reads forward, twice that backward.
        flops=3 * rows * K * V * (2 + math.log2(T)),
    )
