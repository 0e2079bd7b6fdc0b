"""Our kernels beside every peer that is installed.

    python -m benchmarks.kernels --op linear_attention --out results/kernels --rounds 3

writes kernels.json, kernels.md and, with matplotlib, kernels.png. A case module ``benchmarks/cases/<op>.py`` has one
function ``benchmarks() -> list[Benchmark]``.

Peers that autotune compile for minutes. `benchmarks.warm` does that beforehand in many processes on the GPU's machine,
`benchmarks.precompile_kernels` on one without a GPU. With the latter's folder, run twice: first, several processes at once,

    python -m benchmarks.kernels --op delta_rule --precompiled $CACHES --untimed --share 0/4

compiles ours and loads the peers' kernels; then, alone, the same without `--untimed --share` times what was loaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import time
from pathlib import Path

import torch

import benchmarks.cases
from benchmarks.harness import Benchmark, Cell, measure, milliseconds, prepare
from benchmarks.pretuned import share_compiled, tune_recorded
from benchmarks.warm import tune_quickly

OURS = "flame"
RECORD = "kernels.txt"  # what `benchmarks.precompile_kernels` compiled


def find(ops: list[str], texts: list[str]) -> list[Benchmark]:
    """Benchmarks of the modules `ops` (default all) whose name contains one of `texts` (default any), in
    which an underscore may stand for a space."""
    names = ops or [module.name for module in pkgutil.iter_modules(benchmarks.cases.__path__)]
    found = [each for name in names for each in importlib.import_module(f"benchmarks.cases.{name}").benchmarks()]
    texts = [text.replace("_", " ") for text in texts]
    return [each for each in found if not texts or any(text in each.name.replace("_", " ") for text in texts)]


def share_of(benchmarks: list[Benchmark], share: str) -> list[Benchmark]:
    """`index/count`: every count-th, from the index-th on."""
    index, count = map(int, share.split("/"))
    return benchmarks[index::count]


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth and bf16 matrix rate of this machine in this run."""
    x = torch.randn(2**29, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy, product = milliseconds(lambda: y.copy_(x), 200), milliseconds(lambda: a @ b, 200)
    return {"copy_terabytes_per_s": 2 * x.nbytes / copy / 1e9, "matmul_teraflops": 2 * 8192**3 / product / 1e9}


def machine(device: torch.device) -> dict[str, object]:
    import triton

    names = ("fla-core", "flash-linear-attention", "mamba-ssm", "liger-kernel", "cut-cross-entropy")
    peers = {name: version for name in names if (version := installed(name))}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "peers": peers,
        **ceilings(device),
    }


def installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(cells: list[Cell], facts: dict[str, object]) -> str:
    """Markdown: one row a cell; the ratio is a peer's forward + backward over ours (graph replay, else eager)."""
    rows = [
        f"{facts}",
        "",
        "| case | implementation | graph f / f+b ms | eager f / f+b ms | peer / ours graph, eager | MiB | first call s "
        "| TB/s | worst error | status |",
        "|" + "---|" * 10,
    ]
    ours = {cell.name: cell for cell in cells if cell.implementation == OURS}
    for cell in cells:
        own = ours.get(cell.name)
        worst = max(cell.errors.items(), key=lambda item: item[1], default=("-", float("nan")))
        ratios = []
        for clock in ("graph_both_ms", "eager_both_ms"):
            ratios.append("-" if own is None else f"{cell.median(clock) / own.median(clock):.2f}")
        rows.append(
            f"| {cell.name} | {cell.implementation} "
            f"| {cell.median('graph_forward_ms'):.3f} / {cell.median('graph_both_ms'):.3f} "
            f"| {cell.median('eager_forward_ms'):.3f} / {cell.median('eager_both_ms'):.3f} "
            f"| {', '.join(ratios)} | {cell.peak_mib:.0f} | {cell.first_call_s:.1f} | {cell.terabytes_per_s:.2f} "
            f"| {worst[0]} {worst[1]:.1e} | {cell.status} |"
        )
    return "\n".join(rows) + "\n"


def plot(cells: list[Cell], path: Path) -> None:
    """Bars of forward + backward by case and implementation."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No matplotlib, so no plot.")
        return
    names = list(dict.fromkeys(cell.name for cell in cells))
    kinds = list(dict.fromkeys(cell.implementation for cell in cells))
    figure, axes = plt.subplots(figsize=(max(6, len(names)), 4))
    for position, kind in enumerate(kinds):
        times = {cell.name: cell.median("graph_both_ms") for cell in cells if cell.implementation == kind}
        offsets = [index + position / (len(kinds) + 1) for index in range(len(names))]
        axes.bar(offsets, [times.get(name, float("nan")) for name in names], 1 / (len(kinds) + 1), label=kind)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6)
    axes.set_ylabel("forward + backward, ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def write(cells: list[Cell], facts: dict[str, object], folder: Path) -> None:
    """Everything known so far, so that a run that is cut short leaves what it has measured."""
    result = {"machine": facts, "cells": [cell.as_dict() for cell in cells]}
    (folder / "kernels.json").write_text(json.dumps(result, indent=1))
    (folder / "kernels.md").write_text(table(cells, facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="case module, may be repeated; default all")
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains one of these texts")
    parser.add_argument("--out", type=Path, default=Path("outputs/kernels"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat-ms", type=int, default=100, help="measuring time per clock, round and implementation")
    parser.add_argument("--profile", action="store_true", help="also time each kernel of ours (torch.profiler)")
    parser.add_argument("--quick-tuning", action="store_true", help="peers time each configuration for 15 ms, not 100")
    parser.add_argument("--precompiled", type=Path, help="folder of benchmarks.precompile_kernels")
    parser.add_argument("--untimed", action="store_true", help="only first calls and gradient checks")
    parser.add_argument("--share", default="0/1", help="index/count: this process takes every count-th case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further case after this long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels needs a GPU.")
    device = torch.device("cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick_tuning:
        tune_quickly()
    if args.precompiled:
        share_compiled()
        tune_recorded(args.precompiled / RECORD, timed=not args.untimed)
    facts, begun = {} if args.untimed else machine(device), time.perf_counter()
    cells: list[Cell] = []
    for benchmark in share_of(find(args.op, args.case), args.share):
        if time.perf_counter() - begun > args.seconds:
            print(f"No time left for {benchmark.name}.")
            continue
        if args.untimed:
            prepare(benchmark, device, lambda cells: None)
            torch.cuda.empty_cache()
            continue
        done = list(cells)

        def report(new: list[Cell], done: list[Cell] = done) -> None:
            write([*done, *new], facts, args.out)

        cells += measure(benchmark, device, args.rounds, args.repeat_ms, OURS if args.profile else "", report)
        torch.cuda.empty_cache()
        report(cells[len(done) :])
        print(table(cells[len(done) :], {}), flush=True)
        for cell in cells[-len(benchmark.implementations) :]:
            for kernel, microseconds in cell.kernels_us.items():
                print(f"    {microseconds:9.1f} us  {kernel}", flush=True)
    if cells:
        plot(cells, args.out / "kernels.png")


if __name__ == "__main__":
    main()
