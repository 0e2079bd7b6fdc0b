"""Mamba2's state-space core beside the authors' Triton SSD (mamba-ssm) and flash-linear-attention's simple_gla."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

SHAPES = ((8, 4096, 64, 64, 128), (1, 32768, 64, 64, 128), (8, 4096, 32, 64, 128))  # batch, tokens, heads, P, N


def make_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    """x [B, T, H, P], dt [B, T, H] after its softplus, A [H] negative, B and C [B, T, 1, N]."""
    batch, T, H, P, N = shape
    if small:
        batch, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    return {
        "x": normal(batch, T, H, P).bfloat16(),
        "dt": F.softplus(normal(batch, T, H) - 4),
        "A": -1 - 15 * torch.rand(H, generator=g, device=device),
        "B": normal(batch, T, 1, N).bfloat16(),
        "C": normal(batch, T, 1, N).bfloat16(),
    }


def ours(backend: str | None = None) -> Call:
    from flame.kernels.linear_attention import linear_attention

    def call(i: Tensors) -> torch.Tensor:
        x, dt, A, B, C = i.values()
        return linear_attention(C, B, x, scalar_decay=A * dt, value_scale=dt, scale=1.0, backend=backend)[0]

    return call


def fla() -> Call:
    import fla.ops.common.chunk_o as chunk_o
    from fla.ops.simple_gla import chunk_simple_gla

    chunk_o.TRITON_ABOVE_3_7_1 = True  # see linear_attention.fla

    def call(i: Tensors) -> torch.Tensor:
        x, dt, A, B, C = i.values()
        v = (x * dt[..., None]).to(x.dtype)
        q, k = (y.expand(-1, -1, x.shape[2], -1).contiguous() for y in (C, B))
        return chunk_simple_gla(q, k, v, A * dt, scale=1.0)[0]

    return call


def mamba_ssm() -> Call:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def call(i: Tensors) -> torch.Tensor:
        x, dt, A, B, C = i.values()
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)

    return call


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(shape) for shape in SHAPES]


def make_benchmark(shape: tuple[int, ...]) -> Benchmark:
    batch, T, H, P, N = shape
    return Benchmark(
        op="mamba2",
        name=f"mamba2 B{batch} T{T} H{H} P{P} N{N}",
        inputs=lambda device, seed, small: make_inputs(shape, device, seed, small),
        implementations={"flame": ours, "mamba_ssm": mamba_ssm, "fla": fla},
        reference=ours("chunked"),
        constant=("A",),  # one number summed over all time has no relative accuracy in bf16
        # x, y forward; x, dy, dx backward; B, C and their gradients are shared by the heads.
        bytes_moved=2 * batch * T * (5 * H * P + 6 * N),
        flops=12.0 * batch * T * H * P * N,
    )
