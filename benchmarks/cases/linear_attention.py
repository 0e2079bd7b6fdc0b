"""linear_attention beside flash-linear-attention: retention, simple_gla, gla, and gsa's passes by their own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

# (batch, tokens, heads, K, V); the fla registry's six, constant tokens, and model shapes.
COMMON = (
    (8, 4096, 16, 128, 128),
    (2, 16384, 16, 128, 128),
    (1, 32768, 16, 128, 128),
    (1, 8192, 96, 128, 128),
    (4, 2048, 16, 128, 128),
    (8, 1024, 8, 64, 64),
    (8, 2048, 32, 256, 256),
)
MODELS = {
    "retention": ((8, 4096, 8, 256, 512),),
    "scalar": ((8, 4096, 32, 128, 64),),
    "rwkv6": ((8, 4096, 16, 128, 128), (8, 4096, 4, 128, 256)),
    "key": ((8, 4096, 4, 128, 256), (8, 4096, 8, 128, 128), (8, 4096, 4, 256, 512)),
}


def make_inputs(kind: str, shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, K, V = shape
    if small:
        B, T = 1, min(T, 1024) + 7
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    q, k, v = (normal(B, T, H, width).bfloat16() for width in (K, K, V))
    call = {"q": q, "k": k, "v": v}
    if kind == "retention":
        call["decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device=device, dtype=torch.float32))))
    if kind == "scalar":
        call["decay"] = F.logsigmoid(normal(B, T, H)) / 16
    if kind in ("key", "rwkv6"):
        call["decay"] = (F.logsigmoid(normal(B, T, H, K)) / 16).bfloat16()
    if kind == "rwkv6":
        call["bonus"] = normal(H, K).bfloat16()
    return call


def ours(kind: str, backend: str | None = None) -> Call:
    from flame.kernels.linear_attention import linear_attention

    argument = {"retention": "head_decay", "scalar": "scalar_decay"}.get(kind, "key_decay")

    def call(inputs: Tensors) -> torch.Tensor:
        rest = {argument if name == "decay" else name: x for name, x in inputs.items()}
        return linear_attention(**rest, backend=backend)[0]

    return call


def fla(kind: str) -> Call:
    """The peer's chunk ops. Its gated backward refuses Triton 3.4 to 3.7.0 on Hopper; `unguarded` lifts that here only,
    and the harness publishes no time unless the gradients are right."""
    if kind == "retention":
        from fla.ops.retention import chunk_retention

        return lambda x: chunk_retention(x["q"], x["k"], x["v"])[0]
    if kind == "scalar":
        import fla.ops.common.chunk_o as chunk_o
        from fla.ops.simple_gla import chunk_simple_gla

        chunk_o.TRITON_ABOVE_3_7_1 = True
        return lambda x: chunk_simple_gla(x["q"], x["k"], x["v"], x["decay"])[0]
    if kind == "rwkv6":
        from fla.ops.rwkv6 import chunk_rwkv6

        scale = lambda x: x["q"].shape[-1] ** -0.5  # noqa: E731
        return lambda x: chunk_rwkv6(x["q"], x["k"], x["v"], x["decay"], x["bonus"], scale=scale(x))[0]
    from fla.ops.gla import chunk_gla

    return lambda x: chunk_gla(x["q"], x["k"], x["v"], x["decay"])[0]


def benchmarks() -> list[Benchmark]:
    found = []
    for kind, own in MODELS.items():
        for shape in own if kind == "rwkv6" else (*COMMON, *own):
            found.append(make_benchmark(kind, shape))
    return found


def make_benchmark(kind: str, shape: tuple[int, ...]) -> Benchmark:
    B, T, H, K, V = shape
    rows = B * T * H
    # Each tensor once forward (q, k, v, o and a key decay) and once backward (again, with do and the gradients).
    decay = K if kind in ("key", "rwkv6") else 0
    moved = 2 * rows * ((2 * K + 2 * V + decay) + (4 * K + 3 * V + 2 * decay))
    return Benchmark(
        op="linear_attention",
        name=f"{kind} B{B} T{T} H{H} K{K} V{V}",
        inputs=lambda device, seed, small: make_inputs(kind, shape, device, seed, small),
        implementations={"flame": lambda: ours(kind), "fla": lambda: fla(kind)},
        reference=ours(kind, "chunked"),
        constant=("decay",) if kind == "retention" else (),
        bytes_moved=moved,
        flops=12.0 * rows * K * V,
    )
