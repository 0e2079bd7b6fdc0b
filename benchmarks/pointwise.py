"""Norms, short convolution, SwiGLU, rotary and token shift: time beside the bytes they must move, and beside peers.

python benchmarks/pointwise.py [--json out.json]

Needs a GPU. `eager` is the median of triton.testing.do_bench in ms, with the host's share where the host is slower than the
GPU; `graph` replays a captured CUDA graph, so it is the GPU alone. `floor` is every input read once and every output and
gradient written once at the copy bandwidth measured in the same run. Liger and flash-linear-attention are timed if installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flame.kernels.normalization import gated_rms_norm, layer_norm, rms_norm
from flame.kernels.rotary import rotary
from flame.kernels.short_convolution import short_convolution
from flame.kernels.swiglu import swiglu
from flame.kernels.token_shift import token_shift

Call = Callable[..., Tensor]


@dataclass
class Op:
    """name, who: what and whose. call: leaves -> y. shapes: of the leaves. moved: tensors of y's size, forward, backward."""

    name: str
    who: str
    call: Call
    shapes: tuple[tuple[int, ...], ...]
    moved: tuple[int, int]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def ops() -> list[Op]:
    stream, heads, conv, wide = (32768, 2048), (32768, 16, 128), (8, 4096, 2048), (8, 4096, 5632)
    positions = torch.arange(4096, device="cuda")
    silu = {"activation": "silu"}
    found = [
        Op("RMS norm", "flame", rms_norm, (stream, (2048,)), (2, 3)),
        Op("RMS norm of a sum", "flame", lambda x, w, r: rms_norm(x, w, 1e-6, r)[0], (stream, (2048,), stream), (4, 3)),
        Op("layer norm", "flame", layer_norm, (stream, (2048,), (2048,)), (2, 3)),
        Op("gated RMS norm", "flame", gated_rms_norm, (heads, heads, (128,)), (3, 5)),
        Op("short conv + SiLU", "flame", lambda x, w: short_convolution(x, w, **silu)[0], (conv, (2048, 4)), (2, 3)),
        Op("SwiGLU", "flame", swiglu, (wide, wide), (3, 5)),
        Op("rotary", "flame", lambda x: rotary(x, positions), ((8, 4096, 16, 128),), (2, 2)),
        Op("token shift", "flame", lambda x: token_shift(x)[0], (conv,), (2, 2)),
    ]
    return found + peers(stream, heads, conv, wide)


def peers(stream: Any, heads: Any, conv: Any, wide: Any) -> list[Op]:
    found = []
    if (liger := optional("liger_kernel.ops.rms_norm")) is not None:
        norm = liger.LigerRMSNormFunction
        call = lambda x, w: norm.apply(x, w, 1e-6, 0.0, "llama", False)  # noqa: E731
        found.append(Op("RMS norm", "liger", call, (stream, (2048,)), (2, 3)))
        unit = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        found.append(Op("SwiGLU", "liger", unit.apply, (wide, wide), (3, 5)))
    if (fla := optional("fla.modules")) is not None:
        rms, gated = fla.RMSNorm(2048).cuda().bfloat16(), fla.FusedRMSNormGated(128).cuda().bfloat16()
        short = fla.ShortConvolution(2048, 4, activation="silu").cuda().bfloat16()
        found.append(Op("RMS norm", "fla", rms, (stream,), (2, 3)))
        found.append(Op("gated RMS norm", "fla", gated, (heads, heads), (3, 5)))
        found.append(Op("short conv + SiLU", "fla", lambda x: short(x)[0], (conv,), (2, 3)))
    return found


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def median(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median")


def replay(call: Callable[[], Any]) -> Callable[[], None]:
    """The call captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(op: Op, bytes_per_ms: float) -> dict[str, Any]:
    leaves = [random(*shape).requires_grad_() for shape in op.shapes]
    y = op.call(*leaves)
    dy, size = random(*y.shape), y.numel() * 2

    def forward() -> Tensor:
        return op.call(*leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        op.call(*leaves).backward(dy)

    times = {"fwd_eager": median(forward), "fwd_graph": median(replay(forward))}
    times |= {"both_eager": median(both), "both_graph": median(replay(both))}
    floors = {"fwd_floor": op.moved[0] * size / bytes_per_ms, "both_floor": sum(op.moved) * size / bytes_per_ms}
    return {"name": op.name, "who": op.who, **times, **floors}


def copy_bandwidth() -> float:
    """Bytes read and written per ms."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    bandwidth, rows = copy_bandwidth(), []
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.2f} TB/s; ms forward, forward + backward")
    for op in ops():
        try:
            row = measure(op, bandwidth)
        except Exception as problem:  # a peer that fails must not end the others' run
            print(f"{op.name:18s} {op.who:6s} failed: {problem}")
            continue
        rows.append(row)
        parts = (
            f"{row[f'{k}_eager']:.3f} (graph {row[f'{k}_graph']:.3f}, floor {row[f'{k}_floor']:.3f})"
            for k in ("fwd", "both")
        )
        print(f"{op.name:18s} {op.who:6s} {'   '.join(parts)}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
