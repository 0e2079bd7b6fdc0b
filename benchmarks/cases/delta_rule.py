"""delta_rule beside flash-linear-attention: DeltaNet (also with negative eigenvalues), Gated DeltaNet, Gated DeltaProduct of
two and three steps, Comba, Kimi Delta Attention, RWKV-7."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

# (batch, tokens, heads, K, V): the peer's registry, constant tokens, and shapes of models.
COMMON = (
    (8, 4096, 16, 128, 128),
    (1, 32768, 16, 128, 128),
    (1, 8192, 96, 128, 128),
    (4, 2048, 16, 128, 128),
    (8, 1024, 8, 64, 64),
)
LONG = ((8, 4096, 16, 128, 128), (1, 32768, 16, 128, 128))
MODELS = {
    "plain": ((8, 4096, 8, 128, 128),),
    "scalar": ((8, 4096, 6, 256, 512), (8, 4096, 6, 128, 256)),
    "key": ((8, 4096, 8, 128, 128),),
    "rwkv7": ((8, 4096, 32, 64, 64), (8, 4096, 16, 64, 64)),
    "negative": LONG,
    "comba": (*LONG, (8, 4096, 6, 256, 512)),
    "product2": LONG,
    "product3": LONG,
}
STEPS = {"product2": 2, "product3": 3}


def make_inputs(kind: str, shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, H, K, V = shape
    if small:
        B, T = 1, min(T, 1024) + 7
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    rows = T * STEPS.get(kind, 1)
    widths = {"q": (T, K), "k": (rows, K), "v": (rows, V)}
    call = {name: normal(B, length, H, width).bfloat16() for name, (length, width) in widths.items()}
    if kind == "rwkv7":
        kappa = F.normalize(normal(B, T, H, K), dim=-1)
        rate = normal(B, T, H, K).sigmoid()
        decay = -0.6065306597126334 * normal(B, T, H, K).sigmoid()
        return call | {"a": (-kappa).bfloat16(), "b": (kappa * rate).bfloat16(), "decay": decay}
    ungated = kind in ("plain", "negative")
    strongest = 2 if kind in ("negative", *STEPS) else 1  # beta beyond 1 makes eigenvalues negative
    call["beta"] = (strongest * normal(B, rows, H).sigmoid()).to(torch.bfloat16 if ungated else torch.float32)
    if kind == "comba":
        call["erase"] = (call["k"] * normal(H, 1).sigmoid()).bfloat16()
    # The decays that the models start with: softplus of dt in (0.001, 0.1), times rates up to 16.
    if not ungated:
        call["decay"] = -F.softplus(normal(B, T, H, *(K,) * (kind == "key")) - 3)
    return call


def ours(kind: str, backend: str | None = None) -> Call:
    from flame.kernels.delta_rule import delta_rule, dplr_delta_rule

    def call(x: Tensors) -> torch.Tensor:
        if kind == "rwkv7":
            return dplr_delta_rule(x["q"], x["k"], x["v"], x["a"], x["b"], x["decay"], scale=1.0, backend=backend)[0]
        options = {} if "decay" not in x else {"key_decay" if kind == "key" else "scalar_decay": x["decay"]}
        if kind == "comba":
            options |= {"erase_key": x["erase"], "exclusive": True}
        return delta_rule(x["q"], x["k"], x["v"], x["beta"], normalize=True, backend=backend, **options)[0]

    return call


def fla(kind: str) -> Call:
    """The peer's chunk ops with the options its layers use. Its gated backward refuses Triton 3.4 to 3.7.0 on Hopper; that
    is lifted here only, and the harness publishes no time unless the gradients are right."""
    if kind in ("plain", "negative"):
        from fla.ops.delta_rule import chunk_delta_rule

        return lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], use_qk_l2norm_in_kernel=True)[0]
    if kind in ("scalar", "comba", *STEPS):
        return fla_gated(kind)
    if kind == "key":
        from fla.ops.kda import chunk_kda

        return lambda x: chunk_kda(
            x["q"], x["k"], x["v"], x["decay"], x["beta"], use_qk_l2norm_in_kernel=True, safe_gate=True, lower_bound=-5
        )[0]
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda x: chunk_rwkv7(
        x["q"], x["decay"], x["k"], x["v"], x["a"], x["b"], scale=1.0, lower_bound=-0.6065306597126334
    )[0]


def fla_gated(kind: str) -> Call:
    import fla.ops.common.chunk_o as chunk_o

    chunk_o.TRITON_ABOVE_3_7_1 = True
    options = {"use_qk_l2norm_in_kernel": True}
    if kind == "scalar":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda x: chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["decay"], x["beta"], **options)[0]
    if kind == "comba":
        from fla.ops.comba import chunk_comba

        return lambda x: chunk_comba(x["q"], x["k"], x["v"], x["erase"], x["decay"], x["beta"], **options)[0]
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    options["num_householder"] = STEPS[kind]
    return lambda x: chunk_gated_delta_product(x["q"], x["k"], x["v"], x["decay"], x["beta"], **options)[0]


def benchmarks() -> list[Benchmark]:
    return [make_benchmark(kind, shape) for kind in MODELS for shape in shapes(kind)]


def shapes(kind: str) -> tuple[tuple[int, ...], ...]:
    if kind in ("negative", "comba", *STEPS):
        return MODELS[kind]
    return tuple(shape for shape in (*COMMON, *MODELS[kind]) if kind != "rwkv7" or shape[3] == 64)


def make_benchmark(kind: str, shape: tuple[int, ...]) -> Benchmark:
    B, T, H, K, V = shape
    rows = B * T * H * STEPS.get(kind, 1)
    # Each tensor once forward (q, k, v, o, a decay per key) and once backward (again, with do and the gradients).
    by_key = {"key": 2 * K, "rwkv7": 4 * K, "comba": K}.get(kind, 0)
    moved = rows * (2 * (2 * K + 2 * V) + by_key + 2 * (4 * K + 3 * V) + 2 * by_key)
    return Benchmark(
        op="delta_rule",
        name=f"{kind} B{B} T{T} H{H} K{K} V{V}",
        inputs=lambda device, seed, small: make_inputs(kind, shape, device, seed, small),
        implementations={"flame": lambda: ours(kind), "fla": lambda: fla(kind)},
        reference=ours(kind, "chunked"),
        bytes_moved=moved,
        flops=41.0 * rows * K * V,
    )
