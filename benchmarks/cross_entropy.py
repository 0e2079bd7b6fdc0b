"""Linear + cross-entropy against peers, side by side in one run, with the floor of its three matrix products.

python benchmarks/cross_entropy.py [--shapes 32768x2048x32000 ...] [--json out.json]

Needs a GPU. Peers (Liger, flash-linear-attention, cut-cross-entropy) are timed when they are installed. Times are medians of
triton.testing.do_bench of forward + backward in ms; memory is the peak over what was allocated before, in MiB; the error is
the worst relative difference of loss and both gradients to fp64 on the first 1024 tokens and 8192 words.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flame.kernels.cross_entropy import linear_cross_entropy

SHAPES = ["32768x2048x32000", "16384x2048x128256", "32768x1024x32000"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits in memory, torch's cross-entropy in fp32."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def peers() -> dict[str, Loss]:
    """Losses by name, ours first; peers that are not installed are left out."""
    found: dict[str, Loss] = {"flame": linear_cross_entropy, "torch": unfused}
    liger = optional("liger_kernel.transformers")
    if liger is not None:
        plain = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        wide = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        found["liger"] = lambda h, w, y: plain(w, h, y)
        found["liger, fp32 sums"] = lambda h, w, y: wide(w, h, y)
    fla = optional("fla.modules")
    if fla is not None:
        module = fla.FusedLinearCrossEntropyLoss(reduction="sum")
        found["fla"] = lambda h, w, y: module(h, y, w)
    cut = optional("cut_cross_entropy")
    if cut is not None:
        found["cut-cross-entropy"] = lambda h, w, y: cut.linear_cross_entropy(h, w, y, reduction="sum")
    return found


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def inputs(N: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device="cuda") / D**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (N,), device="cuda")
    labels[::17] = -100
    return hidden, weight, labels


def median(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median")


def floor(hidden: Tensor, weight: Tensor) -> float:
    """Time of the three products alone, all tokens at once."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        products = (
            lambda: torch.mm(hidden, weight.t(), out=logits),
            lambda: torch.mm(logits, weight),
            lambda: torch.mm(logits.t(), hidden),
        )
        return sum(median(product) for product in products)


def measure(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float]:
    """Milliseconds of forward + backward, and peak MiB over the inputs."""

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return median(step), peak


def error(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Worst relative difference to fp64 of loss, d hidden and d weight on a corner of the problem."""
    h, w = hidden[:1024].detach(), weight[:8192].detach()
    y = torch.where(labels[:1024] < 0, labels[:1024], labels[:1024] % len(w))
    results = []
    for form, dtype in ((unfused_fp64, torch.float64), (loss, h.dtype)):
        leaves = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        value = form(*leaves, y)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    return max(((b.double() - a).norm() / a.norm()).item() for a, b in zip(*results))


def unfused_fp64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens x hidden size x vocabulary")
    parser.add_argument("--losses", nargs="+", help="only these")
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        problem = inputs(*map(int, shape.split("x")))
        least = floor(*problem[:2])
        print(f"{shape}: three products {least:.2f} ms")
        for name, loss in peers().items():
            if args.losses and name not in args.losses:
                continue
            torch.cuda.empty_cache()
            try:
                ms, peak = measure(loss, *problem)
                rows.append({"shape": shape, "name": name, "ms": ms, "floor_ms": least, "peak_mib": peak})
                rows[-1]["error"] = error(loss, *problem)
                print(f"  {name:20s} {ms:8.2f} ms {ms / least:6.3f}x {peak:8.0f} MiB  error {rows[-1]['error']:.1e}")
            except Exception as problem_of_peer:  # a peer that fails must not end the others' run
                print(f"  {name:20s} failed: {problem_of_peer}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
