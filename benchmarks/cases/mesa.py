"""Mesa, unit length of queries and keys included, beside flash-linear-attention's chunk_mesa_net."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

SHAPES = ((8, 4096, 16, 128), (1, 32768, 16, 128), (8, 4096, 16, 64))  # batch, tokens, heads, K = V
DECAYS = {"fast": 1.0, "slow": 1 / 16}  # factors of log-sigmoid decays: a memory of a few tokens, of some hundred
STEPS = 30


def make_inputs(shape: tuple[int, ...], decay: float, device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, K = shape
    if small:
        B, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    call = {name: normal(B, T, H, K).bfloat16() for name in "qkv"}
    call["log_decay"], call["beta"] = F.logsigmoid(normal(B, T, H)) * decay, normal(B, T, H).sigmoid()
    return call | {"regularizer": F.softplus(normal(H, K)) + 0.25}


def ours(backend: str | None = None) -> Call:
    from flame.kernels.mesa import mesa

    return lambda x: mesa(**x, steps=STEPS, scale_gradient=False, normalize=True, backend=backend)[0]


def fla() -> Call:
    from fla.ops.mesa_net import chunk_mesa_net

    return lambda x: chunk_mesa_net(*x.values(), max_CG_iteration=STEPS, use_qk_l2norm_in_kernel=True)[0]


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(shape, decay) for shape in SHAPES for decay in DECAYS]


def make_benchmark(shape: tuple[int, ...], decay: str) -> Benchmark:
    B, T, H, K = shape
    rows = B * T * H
    return Benchmark(
        op="mesa",
        name=f"mesa {decay} B{B} T{T} H{H} K{K}",
        inputs=lambda device, seed, small: make_inputs(shape, DECAYS[decay], device, seed, small),
        implementations={"flame": ours, "fla": fla},
        reference=ours("chunked"),
        bytes_moved=2.0 * rows * K * (4 + 7),
        # Two solves: a step multiplies a row with H and with the 64 keys of its chunk, twice.
        flops=2.0 * STEPS * rows * 2 * (K * K + 2 * 64 * K),
    )
