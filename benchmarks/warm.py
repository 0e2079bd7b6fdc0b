"""Compile what peers autotune, in parallel, so that their minutes of tuning do not stand in the way of a comparison.

    python -m benchmarks.warm --op linear_attention --case B8 --jobs 12

Each process compiles its share of every kernel's configurations into the common Triton cache, without timing any; the
benchmark afterwards tunes over all of them (`benchmarks.kernels --quick-tuning`, shorter timings of each).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zlib
from typing import Any

import torch

from benchmarks.harness import differentiate


def take_share(index: int, count: int) -> None:
    """From now on this process's autotuners try one configuration in `count` only, and run it once instead of timing."""
    from triton.runtime.autotuner import Autotuner

    bench = Autotuner._bench

    def share(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if zlib.crc32(str(config).encode()) % count != index:
            return [float("inf")] * 3
        return bench(self, *args, config=config, **meta)

    def run_once(self: Any, call: Any, quantiles: Any = None) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    Autotuner._bench = share
    _replace_do_bench(run_once)


def tune_quickly(warmup: int = 3, rep: int = 15) -> None:
    """Autotuners time each configuration for `rep` ms instead of their usual 100."""
    import triton

    def bench(self: Any, call: Any, quantiles: Any = None) -> Any:
        return triton.testing.do_bench(call, warmup=warmup, rep=rep, quantiles=quantiles)

    _replace_do_bench(bench)


def _replace_do_bench(bench: Any) -> None:
    from triton.runtime.autotuner import Autotuner

    def bound(self: Any) -> Any:
        return lambda call, quantiles=None: bench(self, call, quantiles)

    Autotuner.do_bench = property(bound)


def run_share(ops: list[str], text: list[str], index: int, count: int, implementations: list[str]) -> None:
    from benchmarks.kernels import find

    take_share(index, count)
    device = torch.device("cuda")
    for benchmark in find(ops, text):
        for name, load in benchmark.implementations.items():
            if name not in implementations:
                continue
            try:
                differentiate(benchmark, load(), benchmark.inputs(device, 0, False), None)
            except Exception as error:  # the benchmark itself reports what a peer cannot do
                print(f"{benchmark.name} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--implementation", action="append", default=[], help="default fla and mamba_ssm")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--share", type=int, default=-1, help="internal: run this share in this process")
    args = parser.parse_args()
    if args.share >= 0:
        run_share(args.op, args.case, args.share, args.jobs, args.implementation or ["fla", "mamba_ssm"])
        return
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.warm", *sys.argv[1:]]
    # The peer would keep what a share pretends to have chosen on disk, and take it for tuned.
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
    children = [subprocess.Popen([*command, "--share", str(index)], env=environment) for index in range(args.jobs)]
    for child in children:
        child.wait()
    print(f"Compiled in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
