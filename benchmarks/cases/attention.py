"""Softmax attention by each of torch's backends, forgetting attention and PaTH beside flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

# (batch, tokens, heads of q, of k and v, D, Dv)
SOFTMAX = (
    (8, 4096, 16, 16, 128, 128),
    (2, 16384, 16, 16, 128, 128),
    (8, 4096, 16, 16, 64, 64),
    (2, 16384, 16, 16, 64, 64),
    (8, 4096, 16, 4, 128, 128),
    (4, 4096, 16, 16, 192, 128),
)
OURS = (
    (8, 4096, 16, 16, 128, 128),
    (2, 16384, 16, 16, 128, 128),
    (8, 4096, 16, 16, 64, 64),
    (2, 16384, 16, 16, 64, 64),
)


KINDS = ("fox open", "fox initial", "path", "path gated")


def make_inputs(kind: str, shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, Hk, D, Dv = shape
    if small:
        B, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(B, T, *size, generator=g, device=device)

    call = {"q": normal(H, D).bfloat16(), "k": normal(Hk, D).bfloat16(), "v": normal(Hk, Dv).bfloat16()}
    if kind.startswith("fox"):  # gates near 1, where nothing can be left out, or as at initialization
        call["log_forget"] = F.logsigmoid(normal(H) + (6 if kind == "fox open" else 0))
    if kind.startswith("path"):
        call["w"], call["beta"] = F.normalize(normal(Hk, D), dim=-1), 2 * normal(Hk).sigmoid()
    if kind == "path gated":
        call["log_forget"] = F.logsigmoid(normal(H) + 4)
    return call


def ours(kind: str, backend: str | None = None) -> Call:
    if kind.startswith("fox"):
        from flame.kernels.forgetting_attention import forgetting_attention

        return lambda x: forgetting_attention(**x, backend=backend)
    if kind.startswith("path"):
        from flame.kernels.path_attention import path_attention

        return lambda x: path_attention(**x, backend=backend)
    from flame.kernels.softmax_attention import softmax_attention

    return lambda x: softmax_attention(**x, backend=backend)


def torch_backend(name: str) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(x: Tensors) -> torch.Tensor:
        q, k, v = (x[part].transpose(1, 2) for part in "qkv")
        with sdpa_kernel(getattr(SDPBackend, name)):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)

    return call


def fla(kind: str) -> Call:
    if kind.startswith("path"):
        from fla.ops.path_attn.parallel import parallel_path_attn

        return lambda x: parallel_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"], g=x.get("log_forget"))[0]
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    return lambda x: parallel_forgetting_attn(x["q"], x["k"], x["v"], x["log_forget"])


def benchmarks() -> list[Benchmark]:
    found = [make_benchmark("softmax", shape) for shape in SOFTMAX]
    return found + [make_benchmark(kind, shape) for kind in KINDS for shape in OURS]


def make_benchmark(kind: str, shape: tuple[int, ...]) -> Benchmark:
    B, T, H, Hk, D, Dv = shape
    implementations: dict[str, Callable[[], Call]] = {"flame": lambda: ours(kind)}
    if kind == "softmax":
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            implementations[name.lower()] = partial(torch_backend, name)
    else:
        implementations["flash-linear-attention"] = lambda: fla(kind)
    reference = "chunked" if kind.startswith("path") else "reference"
    return Benchmark(
        op="attention",
        name=f"{kind} B={B} T={T} H={H}/{Hk} D={D} Dv={Dv}",
        inputs=lambda device, seed, small: make_inputs(kind, shape, device, seed, small),
        implementations=implementations,
        reference=ours(kind, reference),
        bytes_moved=2.0 * B * T * (4 * H * D + 4 * Hk * (D + Dv)),
        flops=3.5 * 2 * B * H * T * T * (D + Dv) / 2,
    )
