"""native_sparse_attention beside flash-linear-attention's parallel_nsa, without the window branch (which is library code).

The check runs on rows so short that every block is chosen: two right implementations may break near ties differently.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Benchmark, Call, Tensors

SHAPES = ((1, 8192, 64, 4, 128), (1, 32768, 64, 4, 128), (1, 65536, 64, 4, 128), (4, 8192, 32, 2, 64))
BLOCK, COUNT = 64, 16


def make_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, Hk, D = shape
    if small:
        B, T = 1, BLOCK * COUNT - 7
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    tensors = {name: normal(B, T, heads, D).bfloat16() for name, heads in zip("qkv", (H, Hk, Hk))}
    return tensors | {name: torch.sigmoid(normal(B, T, H)).bfloat16() for name in ("g_compressed", "g_selected")}


def ours(backend: str | None = None) -> Call:
    from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention

    def call(inputs: Tensors) -> torch.Tensor:
        q, k, v, *gates = inputs.values()
        gates = torch.stack([*gates, torch.zeros_like(gates[0])], -1)
        return native_sparse_attention(q, k, v, gates, SparsePattern(BLOCK, COUNT, 0), backend=backend)

    return call


def fla() -> Call:
    from fla.ops.nsa import parallel_nsa

    return lambda x: parallel_nsa(*x.values(), g_swa=None, block_counts=COUNT, block_size=BLOCK, window_size=0)


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(shape) for shape in SHAPES]


def make_benchmark(shape: tuple[int, ...]) -> Benchmark:
    B, T, H, Hk, D = shape
    rows = B * T * H
    return Benchmark(
        op="native_sparse_attention",
        name=f"B{B} T{T} H{H}/{Hk} D{D} block{BLOCK} S{COUNT}",
        inputs=lambda device, seed, small: make_inputs(shape, device, seed, small),
        implementations={"flame": lambda: ours(), "fla": fla},
        reference=ours("chunked"),
        # q, o, do, dq of all heads; keys and values beside them are few.
        bytes_moved=2.0 * 6 * rows * D,
        flops=3.5 * 4.0 * rows * D * (BLOCK * COUNT + T / (2 * BLOCK)),
    )
