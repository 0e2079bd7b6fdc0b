"""The scans channel by channel: HGRN's beside flash-linear-attention's, and Mamba's, whose own kernel is no Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Call, Tensors

ELEMENTWISE = ((8, 4096, 1024), (1, 32768, 1024), (8, 4096, 2048))  # batch, tokens, channels
SELECTIVE = ((8, 4096, 2048), (1, 32768, 2048))
STATES = 16


def elementwise_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    B, T, E = shape
    if small:
        B, T = 1, 1031
    g = torch.Generator(device=device).manual_seed(seed)
    x, gate = (torch.randn(B, T, E, generator=g, device=device) for _ in range(2))
    return {"x": x.bfloat16(), "log_decay": F.logsigmoid(gate).bfloat16()}


def elementwise(backend: str | None = None) -> Call:
    from flame.kernels.elementwise_scan import elementwise_scan

    return lambda i: elementwise_scan(**i, backend=backend)[0]


def fla_fused() -> Call:
    from fla.ops.hgrn import fused_recurrent_hgrn

    return lambda i: fused_recurrent_hgrn(i["x"], i["log_decay"])[0]


def fla_chunked() -> Call:
    from fla.ops.hgrn import chunk_hgrn

    return lambda i: chunk_hgrn(i["x"], i["log_decay"])[0]


def selective_inputs(shape: tuple[int, ...], device: torch.device, seed: int, small: bool) -> Tensors:
    """x, dt and z [B, T, E], A [E, S], B and C [B, T, S], D and dt_bias [E]: what Mamba's layer gives its scan."""
    B, T, E = shape
    if small:
        B, T = 1, 519
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    call = {name: normal(B, T, E).bfloat16() for name in ("x", "dt", "z")}
    call |= {name: normal(B, T, STATES).bfloat16() for name in ("B", "C")}
    call["A"] = -torch.arange(1.0, STATES + 1, device=device).repeat(E, 1)
    return call | {"D": normal(E), "dt_bias": normal(E) - 4}


def selective(backend: str | None = None) -> Call:
    from flame.kernels.selective_scan import selective_scan

    return lambda i: selective_scan(**i, backend=backend)[0]


def benchmarks() -> list[Benchmark]:
    return [elementwise_benchmark(shape) for shape in ELEMENTWISE] + [selective_benchmark(shape) for shape in SELECTIVE]


def elementwise_benchmark(shape: tuple[int, ...]) -> Benchmark:
    B, T, E = shape
    return Benchmark(
        op="elementwise_scan",
        name=f"elementwise B{B} T{T} E{E}",
        inputs=lambda device, seed, small: elementwise_inputs(shape, device, seed, small),
        implementations={"flame": elementwise, "fla fused": fla_fused, "fla chunked": fla_chunked},
        reference=elementwise("chunked"),
        bytes_moved=2.0 * B * T * E * (3 + 5),  # x, decay, h; then h, dh, decay, and two gradients
        flops=6.0 * B * T * E,
    )


def selective_benchmark(shape: tuple[int, ...]) -> Benchmark:
    B, T, E = shape
    return Benchmark(
        op="selective_scan",
        name=f"selective B{B} T{T} E{E} S{STATES}",
        inputs=lambda device, seed, small: selective_inputs(shape, device, seed, small),
        implementations={"flame": selective},
        reference=selective("chunked"),
        constant=("A", "D", "dt_bias"),  # sums over all time have no relative accuracy in bf16
        bytes_moved=2.0 * B * T * (E * (4 + 7) + 6 * STATES),
        flops=20.0 * B * T * E * STATES,
    )
